# SPDX-License-Identifier: Apache-2.0
# Which xsimd kv1 accepts, for this build and for the installed package alike.
#
# xsimd's version file accepts its own major version only, so find_package() can not be asked for a range over
# two of them, and once it has loaded a wrong version the target `xsimd` is taken. So the candidates are looked
# at first, and only a fitting one is loaded.

set(kv1_xsimd_range "xsimd 13.2 or newer, older than 15")

function(kv1_xsimd_fits version out)
  if(version VERSION_GREATER_EQUAL 13.2 AND version VERSION_LESS 15)
    set(${out} TRUE PARENT_SCOPE)
  else()
    set(${out} FALSE PARENT_SCOPE)
  endif()
endfunction()

# Sets ${out_dir} to the folder of the first fitting xsimdConfig.cmake, or to "" with ${out_message} saying why.
function(kv1_locate_xsimd out_dir out_message)
  # No xsimd has this version, so every candidate is listed and none is loaded.
  find_package(xsimd 99999 CONFIG QUIET)
  set(seen "")
  foreach(config version IN ZIP_LISTS xsimd_CONSIDERED_CONFIGS xsimd_CONSIDERED_VERSIONS)
    kv1_xsimd_fits("${version}" fits)
    if(fits)
      get_filename_component(dir "${config}" DIRECTORY)
      set(${out_dir} "${dir}" PARENT_SCOPE)
      set(${out_message} "" PARENT_SCOPE)
      return()
    endif()
    string(APPEND seen " Found, but not usable: xsimd ${version} (${config}).")
  endforeach()
  set(${out_dir} "" PARENT_SCOPE)
  set(${out_message}
      "kv1 needs ${kv1_xsimd_range}.${seen} Install one that fits and name its prefix in CMAKE_PREFIX_PATH."
      PARENT_SCOPE)
endfunction()

# Makes kv1::xsimd out of whichever target this xsimd has, or sets ${out_message} when its version does not fit.
function(kv1_adopt_xsimd out_message)
  set(${out_message} "" PARENT_SCOPE)
  if(TARGET kv1::xsimd)
    return()
  endif()
  set(target xsimd)
  if(NOT TARGET xsimd)
    set(target xsimd::xsimd)
  endif()
  if(NOT TARGET ${target})
    set(${out_message} "xsimd was found, but it defines neither the target xsimd nor xsimd::xsimd." PARENT_SCOPE)
    return()
  endif()

  # The target may come from a project that added xsimd's sources: only its header surely tells the version.
  get_target_property(dirs ${target} INTERFACE_INCLUDE_DIRECTORIES)
  foreach(dir IN LISTS dirs)
    string(REGEX REPLACE "^\\$<BUILD_INTERFACE:(.*)>$" "\\1" dir "${dir}")
    set(header "${dir}/xsimd/config/xsimd_config.hpp")
    if(EXISTS "${header}")
      file(STRINGS "${header}" lines REGEX "#define XSIMD_VERSION_(MAJOR|MINOR|PATCH) +[0-9]+")
      string(REGEX REPLACE "[^;0-9]*XSIMD_VERSION_[A-Z]+ +" "" version "${lines}")
      string(REPLACE ";" "." version "${version}")
      kv1_xsimd_fits("${version}" fits)
      if(NOT fits)
        set(${out_message}
            "kv1 needs ${kv1_xsimd_range}, but the target ${target} is version ${version} (${dir}). Let the \
project that defines it use one that fits."
            PARENT_SCOPE)
        return()
      endif()
      break()
    endif()
  endforeach()

  add_library(kv1::xsimd INTERFACE IMPORTED ${ARGN})
  target_link_libraries(kv1::xsimd INTERFACE ${target})
endfunction()
