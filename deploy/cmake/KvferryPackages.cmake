# Debian packages by "cpack -G DEB"; deploy/make-packages.sh does it with what belongs before and
# after. One package a component; what they need is worked out from the programs (dpkg-shlibdeps).
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME kvferry)
# Its default, which CPack does not put above what the components say themselves.
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${CMAKE_PROJECT_NAME} built using CMake")
set(CPACK_PACKAGE_CONTACT "kvferry maintainers <kvferry@kvferry.invalid>")
set(CPACK_PACKAGE_VERSION ${PROJECT_VERSION})
set(CPACK_PACKAGING_INSTALL_PREFIX ${CMAKE_INSTALL_PREFIX})
set(CPACK_STRIP_FILES ON)
set(CPACK_COMPONENTS_ALL daemon tools client client-dev)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ
                                                GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_COMPONENTS_GROUPING IGNORE)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)
set(CPACK_DEBIAN_COMPRESSION_TYPE xz)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS ON)
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS_POLICY ">=")
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
# A package of this build depends on the library of this build.
set(same_version "(= ${PROJECT_VERSION}-${CPACK_DEBIAN_PACKAGE_RELEASE})")

set(CPACK_DEBIAN_DAEMON_PACKAGE_NAME kvferryd)
set(CPACK_DEBIAN_DAEMON_PACKAGE_SECTION net)
# The unit reloads by kvferryctl.
set(CPACK_DEBIAN_DAEMON_PACKAGE_DEPENDS
    "adduser, init-system-helpers (>= 1.52), kvferry-tools ${same_version}")
set(CPACK_COMPONENT_DAEMON_DESCRIPTION
    "KV-cache transfer daemon
Moves the KV cache of LLM requests between prefill and decode workers of
any parallel layout: imports their memory, gathers scattered pages into
large chunks, sends them over UCX, scatters them at the other end. GPUs
are used where NVIDIA's driver is found at run time.")
set(CPACK_DEBIAN_DAEMON_PACKAGE_CONTROL_EXTRA
    ${CMAKE_SOURCE_DIR}/deploy/debian/kvferryd/postinst;${CMAKE_SOURCE_DIR}/deploy/debian/kvferryd/prerm;${CMAKE_SOURCE_DIR}/deploy/debian/kvferryd/postrm;${CMAKE_SOURCE_DIR}/deploy/debian/kvferryd/conffiles)

set(CPACK_DEBIAN_TOOLS_PACKAGE_NAME kvferry-tools)
set(CPACK_DEBIAN_TOOLS_PACKAGE_SECTION net)
set(CPACK_DEBIAN_TOOLS_PACKAGE_SUGGESTS "kvferryd ${same_version}")
set(CPACK_COMPONENT_TOOLS_DESCRIPTION
    "Tools of the KV-cache transfer daemon
Holds kvferryctl, which shows and steers a daemon and tells what on a
machine stands in its way, and kvferry-bench, which measures hand-offs
between two daemons and verifies each byte.")

set(CPACK_DEBIAN_CLIENT_PACKAGE_NAME libkvferry0)
set(CPACK_DEBIAN_CLIENT_PACKAGE_SECTION libs)
set(CPACK_DEBIAN_CLIENT_PACKAGE_CONTROL_EXTRA ${CMAKE_SOURCE_DIR}/deploy/debian/libkvferry0/triggers)
set(CPACK_COMPONENT_CLIENT_DESCRIPTION
    "Client library of the KV-cache transfer daemon
With it an inference engine's worker shares its KV memory with kvferryd,
says what lies where, and sends and receives the KV of requests.")

set(CPACK_DEBIAN_CLIENT-DEV_PACKAGE_NAME libkvferry-dev)
set(CPACK_DEBIAN_CLIENT-DEV_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_CLIENT-DEV_PACKAGE_SHLIBDEPS OFF)
set(CPACK_DEBIAN_CLIENT-DEV_PACKAGE_DEPENDS "libkvferry0 ${same_version}")
set(CPACK_COMPONENT_CLIENT-DEV_DESCRIPTION
    "Client library of the KV-cache transfer daemon, for development
Headers, a CMake package (kvferry::client) and a pkg-config file.")

# Each with what Debian wants to find in /usr/share/doc.
if(CMAKE_INSTALL_PREFIX STREQUAL "/usr")
  set(changelog ${CMAKE_BINARY_DIR}/deploy/changelog.Debian.gz)
  configure_file(deploy/debian/changelog.in ${CMAKE_BINARY_DIR}/deploy/changelog.Debian @ONLY)
  execute_process(COMMAND ${KVFERRY_GZIP} -9nc ${CMAKE_BINARY_DIR}/deploy/changelog.Debian
                  OUTPUT_FILE ${changelog} COMMAND_ERROR_IS_FATAL ANY)
  foreach(pair daemon:kvferryd tools:kvferry-tools client:libkvferry0 client-dev:libkvferry-dev)
    string(REGEX MATCH "^[^:]*" component ${pair})
    string(REGEX REPLACE "^[^:]*:" "" package ${pair})
    set(doc ${CMAKE_INSTALL_DATADIR}/doc/${package})
    install(FILES ${changelog} deploy/debian/copyright DESTINATION ${doc} COMPONENT ${component})
  endforeach()
endif()
# Only what is installed is built for it, not all.
set(CMAKE_SKIP_INSTALL_ALL_DEPENDENCY ON)
include(CPack)
