# Compiler settings shared by every target of the project.
find_program(KVFERRY_CCACHE ccache)
if(KVFERRY_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # The base directory makes objects shareable between build directories.
  set(CMAKE_CXX_COMPILER_LAUNCHER
      ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${KVFERRY_CCACHE})
endif()

add_library(kvferry_flags INTERFACE)
target_include_directories(kvferry_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(
  kvferry_flags
  INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast
            -Wnon-virtual-dtor -Woverloaded-virtual)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC 12 takes std::string's operator+ for overlapping copies (its bug 105651).
  target_compile_options(kvferry_flags INTERFACE -Wno-restrict)
endif()
if(KVFERRY_WERROR)
  target_compile_options(kvferry_flags INTERFACE -Werror)
endif()
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  target_compile_options(kvferry_flags INTERFACE -Wthread-safety)
endif()

if(KVFERRY_SANITIZE)
  add_compile_options(-fsanitize=${KVFERRY_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${KVFERRY_SANITIZE})
endif()

# Edges and comparisons of all that is compiled are what libFuzzer goes by; its main() comes with each
# fuzzer's own link (tests/fuzz).
if(KVFERRY_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "KVFERRY_FUZZERS needs clang: cmake --preset fuzz")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link -fno-sanitize-recover=undefined)
endif()

# kvferry_library(NAME SOURCES... LIBS...): a static library inside the project.
function(kvferry_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC kvferry_flags ${ARG_LIBS})
endfunction()
