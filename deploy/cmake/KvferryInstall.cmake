# What "cmake --install" puts where, by component: daemon, tools, client, client-dev. The packages
# (KvferryPackages.cmake) are the same components.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(KVFERRY_BIN_DIR ${CMAKE_INSTALL_FULL_BINDIR})
set(KVFERRY_CONFIG_DIR ${CMAKE_INSTALL_FULL_SYSCONFDIR}/kvferry)
# Of a package for prefix /usr the configuration is in /etc, which is not below it.
if(CMAKE_INSTALL_PREFIX STREQUAL "/usr")
  set(config_destination /etc/kvferry)
  # Where Debian 12 has them; /usr/lib/systemd is the same folder on a running system.
  set(unit_destination /lib/systemd/system)
else()
  set(config_destination ${CMAKE_INSTALL_SYSCONFDIR}/kvferry)
  set(unit_destination lib/systemd/system)
endif()
set(generated ${CMAKE_BINARY_DIR}/deploy)
configure_file(${CMAKE_SOURCE_DIR}/deploy/systemd/kvferryd.service.in
               ${generated}/kvferryd.service @ONLY)

install(TARGETS kvferryd RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT daemon)
# Started by kvferryd alone, which looks for it there.
install(TARGETS kvferry-rails RUNTIME DESTINATION ${CMAKE_INSTALL_LIBEXECDIR}/kvferry COMPONENT daemon)
install(FILES config/kvferry.toml DESTINATION ${config_destination} COMPONENT daemon)
# A file that says what the folder is for keeps it there.
install(FILES config/conf.d/README DESTINATION ${config_destination}/conf.d COMPONENT daemon)
install(DIRECTORY config/examples DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/kvferryd
        COMPONENT daemon)
install(FILES ${generated}/kvferryd.service DESTINATION ${unit_destination} COMPONENT daemon)
install(FILES deploy/systemd/kvferry.sysusers DESTINATION lib/sysusers.d RENAME kvferry.conf
        COMPONENT daemon)

install(TARGETS kvferryctl kvferry-bench RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT tools)

# The manual, and completions by the names under which both shells look for them.
function(kvferry_manual component)
  foreach(page ${ARGN})
    string(REGEX REPLACE ".*\\." "" section ${page})
    set(file ${CMAKE_SOURCE_DIR}/deploy/man/${page})
    # Packages have it compressed.
    if(CMAKE_INSTALL_PREFIX STREQUAL "/usr")
      find_program(KVFERRY_GZIP gzip REQUIRED)
      execute_process(COMMAND ${KVFERRY_GZIP} -9nc ${file} OUTPUT_FILE ${generated}/${page}.gz
                      COMMAND_ERROR_IS_FATAL ANY)
      set(file ${generated}/${page}.gz)
    endif()
    install(FILES ${file} DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section}
            COMPONENT ${component})
  endforeach()
endfunction()
function(kvferry_completion component)
  foreach(program ${ARGN})
    install(FILES deploy/completion/${program}.bash
            DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME ${program}
            COMPONENT ${component})
    install(FILES deploy/completion/_${program}
            DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/vendor-completions COMPONENT ${component})
  endforeach()
endfunction()
kvferry_manual(daemon kvferryd.8 kvferry.toml.5)
kvferry_manual(tools kvferryctl.1 kvferry-bench.1)
kvferry_completion(daemon kvferryd)
kvferry_completion(tools kvferryctl kvferry-bench)

# The library: only the shared one. The static one needs archives of the project that are nobody
# else's business.
set_target_properties(kvferry_client_shared PROPERTIES EXPORT_NAME client)
target_compile_features(kvferry_client_shared INTERFACE cxx_std_20)
install(TARGETS kvferry_client_shared EXPORT kvferry
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT client
        NAMELINK_COMPONENT client-dev)
install(DIRECTORY client/cpp/include/kvferry DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        COMPONENT client-dev)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kvferry)
install(EXPORT kvferry NAMESPACE kvferry:: FILE kvferry-targets.cmake DESTINATION ${package_dir}
        COMPONENT client-dev)
configure_package_config_file(deploy/cmake/kvferry-config.cmake.in ${generated}/kvferry-config.cmake
                              INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor release may break the library's users.
write_basic_package_version_file(${generated}/kvferry-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${generated}/kvferry-config.cmake ${generated}/kvferry-config-version.cmake
        DESTINATION ${package_dir} COMPONENT client-dev)
file(RELATIVE_PATH kvferry_pc_up /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" kvferry_pc_up "${kvferry_pc_up}")
configure_file(deploy/cmake/kvferry.pc.in ${generated}/kvferry.pc @ONLY)
install(FILES ${generated}/kvferry.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
        COMPONENT client-dev)
