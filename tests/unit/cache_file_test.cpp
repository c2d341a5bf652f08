// SPDX-License-Identifier: Apache-2.0
//
// Saved caches as files: what is replaced and what is kept, and whatever a path may lead to.
#include "compare.hpp"
#include "random.hpp"
#include "saved_bytes.hpp"
#include "temporary_folder.hpp"

#include <catch2/catch_test_macros.hpp>

#include <kv1/cache_file.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <thread>
#include <vector>
#if !defined(_WIN32)
#include <csignal>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

using kv1::errc;
using kv1::kv_cache;
using kv1::sequence_id;

namespace {

namespace fs = std::filesystem;

kv1::cache_description described() { return kv1::uniform_cache(2, {1, 16, 16}, 512, 16); }

// A cache with one sequence.
struct world {
    kv_cache cache{described()};
    sequence_id id;
    explicit world(std::size_t tokens = 40) : id(cache.create_sequence()) {
        kv1_test::generator g(tokens);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            const std::vector<float> k = kv1_test::normal_values(g, tokens * 16),
                                     v = kv1_test::normal_values(g, tokens * 16);
            cache.append(id, layer, {k.data(), tokens, 1, 16}, {v.data(), tokens, 1, 16});
        }
    }
    [[nodiscard]] kv1_test::saved_bytes bytes() const { return kv1_test::try_saved(cache, {&id, 1}).value(); }
    [[nodiscard]] kv1::status save(const fs::path& path) const {
        return kv1::try_save_file(cache, {&id, 1}, path);
    }
};

std::vector<std::string> names_in(const fs::path& folder) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder))
        names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}
using names = std::vector<std::string>;

kv1_test::saved_bytes contents(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    const std::string text(std::istreambuf_iterator<char>(in), {});
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}
// The length of what a file holds.
std::size_t loaded(const fs::path& path) {
    kv_cache fresh(described());
    sequence_id id;
    REQUIRE(kv1::load_file(fresh, path, {&id, 1}) == 1);
    fresh.validate();
    return fresh.length(id);
}

} // namespace

TEST_CASE("a file is replaced whole, and nothing is left beside it", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path path = folder.write("session.kv1", "something old");
    world w;
    REQUIRE(w.save(path));
    REQUIRE(names_in(folder.path()) == names{"session.kv1"});
    REQUIRE(contents(path) == w.bytes());
    REQUIRE(loaded(path) == 40);

    // a save that fails leaves the old file
    const sequence_id stale = w.cache.create_sequence();
    w.cache.destroy_sequence(stale);
    REQUIRE(kv1::try_save_file(w.cache, {&stale, 1}, path).code() == errc::invalid_sequence);
    REQUIRE(names_in(folder.path()) == names{"session.kv1"});
    REQUIRE(loaded(path) == 40);

    kv_cache fresh(described());
    std::vector<sequence_id> ids(1);
    REQUIRE(w.save(folder.path() / "missing" / "session.kv1").code() == errc::io_error);
    REQUIRE(w.save("").code() == errc::io_error);
    REQUIRE(kv1::try_load_file(fresh, folder.path() / "missing", ids).code() == errc::io_error);
    REQUIRE(kv1::try_load_file(fresh, folder.path(), ids).code() == errc::io_error);
    REQUIRE(kv1::try_load_file(fresh, folder.write("empty", ""), ids).code() == errc::truncated);
    REQUIRE(kv1::try_load_file(fresh, folder.write("other", std::string(200, 'x')), ids).code() ==
            errc::bad_format);
    fs::create_directory(folder.path() / "taken"); // can not be replaced by a file
    REQUIRE(w.save(folder.path() / "taken").code() == errc::io_error);
    REQUIRE(names_in(folder.path()) == names{"empty", "other", "session.kv1", "taken"});
}

TEST_CASE("a file that goes on after its end is refused", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path path = folder.path() / "session.kv1";
    const world w;
    REQUIRE(w.save(path));
    std::ofstream(path, std::ios::app | std::ios::binary) << 'x';
    kv_cache fresh(described());
    sequence_id id;
    REQUIRE(kv1::try_load_file(fresh, path, {&id, 1}).code() == errc::bad_format);
    REQUIRE(fresh.statistics().pages_in_use == 0);
    fs::resize_file(path, fs::file_size(path) - 1);
    REQUIRE(kv1::load_file(fresh, path, {&id, 1}) == 1);
}

TEST_CASE("files carry options: a model, and prefixes", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path path = folder.path() / "prompts.kv1";
    world w;
    const std::vector<kv1::token_id> prompt(40, 3);
    w.cache.store_prefix(w.id, prompt);
    const kv1::model_fingerprint model = kv1::fingerprint_of("a model");
    kv1::save_file(w.cache, {}, path, {.model = model, .prefixes = true});
    kv_cache fresh(described());
    REQUIRE(kv1::try_load_file(fresh, path, {}).code() == errc::different_model);
    REQUIRE(kv1::load_file(fresh, path, {}, {.model = model}) == 0);
    REQUIRE(fresh.create_from_prefix(prompt).tokens == 32);
}

TEST_CASE("names are the system's own, whatever letters they have", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path path = folder.path() / fs::path(u8"Größe \u00e9\u03b1\u0416\u6f22 \U0001f600.kv1");
    const world w;
    REQUIRE(w.save(path));
    REQUIRE(loaded(path) == 40);
}

TEST_CASE("saves to one name at a time are each whole, and leave nothing", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path path = folder.path() / "session.kv1";
    std::vector<std::thread> writers;
    std::vector<std::size_t> failed(6);
    for (std::size_t i = 0; i < failed.size(); ++i)
        writers.emplace_back([&, i] {
            const world w(i + 1);
            for (int n = 0; n < 20; ++n)
                failed[i] += w.save(path) ? 0u : 1u;
        });
    for (std::thread& t : writers)
        t.join();
    REQUIRE(failed == std::vector<std::size_t>(6));
    REQUIRE(loaded(path) <= 6);
    REQUIRE(names_in(folder.path()) == names{"session.kv1"});
}

#if !defined(_WIN32)

namespace {

mode_t mode_of(const fs::path& path) {
    struct stat s {};
    REQUIRE(::stat(path.c_str(), &s) == 0);
    return s.st_mode & 07777;
}

// Runs body() in a process of its own; its exit code, or minus the signal that ended it.
template <class Body>
int in_another_process(Body&& body) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0)
        ::_exit(body());
    int state = 0;
    REQUIRE(::waitpid(child, &state, 0) == child);
    return WIFEXITED(state) ? WEXITSTATUS(state) : -WTERMSIG(state);
}

} // namespace

TEST_CASE("a file that is saved over keeps its mode; a new one has what the umask leaves", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const world w;
    const fs::path path = folder.path() / "session.kv1";
    for (const mode_t mask : {022u, 027u, 077u, 0u}) {
        const mode_t before = ::umask(mask);
        const kv1::status s = w.save(path);
        ::umask(before);
        REQUIRE(s);
        REQUIRE(mode_of(path) == (0666 & ~mask));
        fs::remove(path);
    }
    REQUIRE(w.save(path));
    for (const mode_t mode : {0600u, 0640u, 0444u, 0777u, 0604u, 0400u}) {
        REQUIRE(::chmod(path.c_str(), mode) == 0);
        REQUIRE(w.save(path));
        REQUIRE(mode_of(path) == mode);
    }
    REQUIRE(names_in(folder.path()) == names{"session.kv1"});
}

TEST_CASE("a file that is saved over keeps its owner where that is permitted", "[io][file]") {
    if (::geteuid() != 0)
        SKIP("only root may give files away");
    const kv1_test::temporary_folder folder;
    REQUIRE(::chmod(folder.path().c_str(), 0777) == 0);
    const world w;
    const fs::path path = folder.path() / "session.kv1";
    const auto owner = [&] {
        struct stat s {};
        REQUIRE(::stat(path.c_str(), &s) == 0);
        return std::pair(s.st_uid, s.st_gid);
    };
    REQUIRE(w.save(path));
    REQUIRE(::chown(path.c_str(), 1234, 2345) == 0);
    REQUIRE(::chmod(path.c_str(), 0640) == 0);
    REQUIRE(w.save(path));
    REQUIRE(owner() == std::pair<uid_t, gid_t>(1234, 2345));
    REQUIRE(mode_of(path) == 0640);
    // somebody else, who is in no group of the file's: what its group could read his may not
    REQUIRE(in_another_process([&] {
                if (::setgid(4567) != 0 || ::setuid(4567) != 0)
                    return 2;
                return w.save(path) ? 0 : 1;
            }) == 0);
    REQUIRE(owner() == std::pair<uid_t, gid_t>(4567, 4567));
    REQUIRE(mode_of(path) == 0600);
    REQUIRE(loaded(path) == 40);
}

TEST_CASE("links are followed to the file that they lead to", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path real = folder.path() / "real", links = folder.path() / "links";
    fs::create_directory(real);
    fs::create_directory(links);
    fs::create_symlink("../real/session.kv1", links / "relative");
    fs::create_symlink(real / "session.kv1", links / "absolute");
    fs::create_symlink("relative", links / "chain");
    fs::create_directory_symlink("../real", links / "folder");
    world w;
    std::size_t tokens = 40;
    for (const char* name :
         {"chain", "relative", "absolute", "folder/session.kv1"}) { // the first makes the file
        REQUIRE(w.save(links / name));
        REQUIRE(names_in(real) == names{"session.kv1"});
        REQUIRE(contents(real / "session.kv1") == w.bytes());
        REQUIRE(loaded(links / name) == tokens);
        w = world(++tokens);
    }
    REQUIRE(names_in(links) == names{"absolute", "chain", "folder", "relative"});
    for (const char* name : {"absolute", "chain", "folder", "relative"})
        REQUIRE(fs::is_symlink(links / name));

    fs::create_symlink("two", links / "one");
    fs::create_symlink("one", links / "two");
    REQUIRE(w.save(links / "one").code() == errc::io_error);
    fs::create_symlink("nowhere/session.kv1", links / "lost");
    REQUIRE(w.save(links / "lost").code() == errc::io_error);
    REQUIRE(fs::is_symlink(links / "one"));
}

TEST_CASE("pipes and devices are written to and read from, never replaced", "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path path = folder.path() / "pipe";
    REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
    world w(200); // more than a pipe holds
    kv1::status s(errc::io_error, "");
    std::thread writer([&] { s = w.save(path); });
    kv_cache fresh(described());
    sequence_id id;
    const auto n = kv1::try_load_file(fresh, path, {&id, 1});
    writer.join();
    REQUIRE(s);
    REQUIRE(n);
    REQUIRE(fresh.length(id) == 200);
    REQUIRE(fs::is_fifo(path));

    // what is written before and after it stays the stream's
    kv1_test::saved_bytes twice = w.bytes();
    twice.push_back(std::byte{42});
    std::thread feeder([&] {
        std::ofstream out(path, std::ios::binary);
        out.write(reinterpret_cast<const char*>(twice.data()), static_cast<std::streamsize>(twice.size()));
    });
    const auto again = kv1::try_load_file(fresh, path, {&id, 1});
    feeder.join();
    REQUIRE(again);

    if (fs::is_character_file("/dev/null")) {
        fs::create_symlink("/dev/null", folder.path() / "null");
        REQUIRE(w.save(folder.path() / "null"));
        REQUIRE(w.save("/dev/null"));
        REQUIRE(fs::is_character_file("/dev/null"));
        REQUIRE(kv1::try_load_file(fresh, "/dev/null", {&id, 1}).code() == errc::truncated);
    }
    if (fs::is_character_file("/dev/full")) {
        const kv1::status full = w.save("/dev/full");
        REQUIRE(full.code() == errc::io_error);
        REQUIRE(full.rule() == std::string("no space is left for the file"));
    }
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    std::thread reader([&] {
        kv_cache other(described());
        kv1::detail::file_descriptor in(ends[0]);
        s = kv1::try_load(other, kv1::detail::stream_source(in), {&id, 1}).reason();
    });
    const fs::path descriptor = "/dev/fd/" + std::to_string(ends[1]);
    const kv1::status written = fs::exists(descriptor) ? w.save(descriptor) : kv1::status();
    ::close(ends[1]);
    reader.join();
    REQUIRE(written);
    REQUIRE((s || !fs::exists("/dev/fd/0")));
}

TEST_CASE("what a killed save left is removed by the next one, and what another still writes is not",
          "[io][file]") {
    const kv1_test::temporary_folder folder;
    const fs::path path = folder.path() / "session.kv1";
    const world w, longer(41);
    REQUIRE(w.save(path));
    const auto begin = [&](kv1::detail::replaced_file& file) {
        return file.open(path) && file(std::as_bytes(std::span("KV1CACHE")));
    };
    const auto killed = [&] {
        return in_another_process([&] {
            kv1::detail::replaced_file file;
            if (!begin(file))
                return 1;
            ::raise(SIGKILL);
            return 2;
        });
    };
    REQUIRE(killed() == -SIGKILL);
    REQUIRE(names_in(folder.path()) == names{"session.kv1", "session.kv1.kv1-partial"});
    REQUIRE(loaded(path) == 40);
    REQUIRE(killed() == -SIGKILL); // it removes the first one's and leaves its own
    REQUIRE(names_in(folder.path()) == names{"session.kv1", "session.kv1.kv1-partial"});

    // its mode, when it was killed, may have been one that its owner cannot write to
    REQUIRE(::chmod((path.string() + ".kv1-partial").c_str(), 0600) == 0);
    REQUIRE(longer.save(path));
    REQUIRE(names_in(folder.path()) == names{"session.kv1"});
    REQUIRE(loaded(path) == 41);

    {
        kv1::detail::replaced_file slow, slower;
        REQUIRE(begin(slow));
        REQUIRE(begin(slower));
        REQUIRE(killed() == -SIGKILL);
        REQUIRE(names_in(folder.path()) == names{"session.kv1", "session.kv1.1.kv1-partial",
                                                 "session.kv1.2.kv1-partial", "session.kv1.kv1-partial"});
        REQUIRE(w.save(path)); // not held up by those that still write
        REQUIRE(loaded(path) == 40);
        REQUIRE(names_in(folder.path()) ==
                names{"session.kv1", "session.kv1.1.kv1-partial", "session.kv1.kv1-partial"});
        const auto all = longer.bytes();
        REQUIRE(slow(std::span(all).subspan(9)));
        REQUIRE(slow.finish());
        REQUIRE(fs::file_size(path) == all.size());
    } // the slower one gives up
    REQUIRE(names_in(folder.path()) == names{"session.kv1"});

    // other files are let be, and a name that is taken is stepped over
    folder.write("session.kv1.partial", "mine");
    fs::create_directory(folder.path() / "session.kv1.kv1-partial");
    fs::create_symlink("session.kv1.partial", folder.path() / "session.kv1.1.kv1-partial");
    REQUIRE(w.save(path));
    REQUIRE(names_in(folder.path()) == names{"session.kv1", "session.kv1.1.kv1-partial",
                                             "session.kv1.kv1-partial", "session.kv1.partial"});
    REQUIRE(contents(folder.path() / "session.kv1.partial").size() == 4);
    REQUIRE(loaded(path) == 40);
}

#endif
