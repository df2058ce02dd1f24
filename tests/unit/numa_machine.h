// Machines with several NUMA nodes for tests: as hwloc's environment tells of them, and a directory
// that stands for /sys.
#pragma once

#include <stdlib.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/unit/cpus.h"

namespace kvferry::numa {

// While it lives hwloc sees that machine, and takes it for this one if `here`. For tests without
// threads.
class Machine {
 public:
  explicit Machine(const char* synthetic, bool here = true) {
    ::setenv("HWLOC_SYNTHETIC", synthetic, 1);
    if (here) ::setenv("HWLOC_THISSYSTEM", "1", 1);
  }
  ~Machine() {
    ::unsetenv("HWLOC_SYNTHETIC");
    ::unsetenv("HWLOC_THISSYSTEM");
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
};

inline CpuSet own_cpus() {
  const CpuSet own = usable_cpus(0);
  REQUIRE(own.any());
  return own;
}

// Synthetic machines number their processors from 0, and we keep to those that we may use.
inline bool has_cpus_0_and_1() {
  const bool has = own_cpus().test(0) && own_cpus().test(1);
  if (!has) WARN("not tested: this process may not use the processors 0 and 1");
  return has;
}

class FakeSysfs {
 public:
  FakeSysfs() {
    std::string name = (std::filesystem::temp_directory_path() / "numa-test-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    root_ = name;
    for (const char* part : {"class/net", "bus/pci/devices"})
      std::filesystem::create_directories(root_ / part);
  }
  ~FakeSysfs() { std::filesystem::remove_all(root_); }
  FakeSysfs(const FakeSysfs&) = delete;
  FakeSysfs& operator=(const FakeSysfs&) = delete;

  std::string path() const { return root_.string(); }

  void add_pci(const std::string& bus_id, int node) const {
    std::filesystem::create_directories(pci(bus_id));
    std::ofstream(pci(bus_id) / "numa_node") << node << "\n";
    std::filesystem::create_directory_symlink(pci(bus_id), root_ / "bus/pci/devices" / bus_id);
  }
  // A virtio interface: the slot, and with it the node, is one level above its device.
  void add_interface(const std::string& name, const std::string& bus_id, int node) const {
    add_pci(bus_id, node);
    const std::filesystem::path device = pci(bus_id) / "virtio0";
    std::filesystem::create_directories(device / "net" / name);
    std::filesystem::create_directory_symlink(device, device / "net" / name / "device");
    std::filesystem::create_directory_symlink(device / "net" / name, root_ / "class/net" / name);
  }
  void add_virtual(const std::string& name, const std::vector<std::string>& lower) const {
    const std::filesystem::path at = root_ / "devices/virtual/net" / name;
    std::filesystem::create_directories(at);
    for (const std::string& below : lower)
      std::filesystem::create_directory_symlink(root_ / "class/net" / below,
                                                at / ("lower_" + below));
    std::filesystem::create_directory_symlink(at, root_ / "class/net" / name);
  }

 private:
  std::filesystem::path pci(const std::string& bus_id) const {
    return root_ / "devices/pci0000:00" / bus_id;
  }
  std::filesystem::path root_;
};

}  // namespace kvferry::numa
