// One GPU and all of them, over the fake driver.
#include "daemon/gpu/device.h"

#include <catch2/catch.hpp>
#include <thread>

#include "tests/fake_cuda/control.h"

namespace kvferry::gpu {
namespace {

using fake_cuda::Machine;
using fake_cuda::Setup;

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;

Setup gpus(int devices, const std::string& lacks = {}, const std::string& visible = {}) {
  Setup setup;
  setup.devices = devices;
  setup.memory_mb = 64;
  setup.lacks = lacks;
  setup.visible = visible;
  return setup;
}

std::shared_ptr<const cuda::Driver> load() {
  auto driver = cuda::Driver::load(kLibrary);
  REQUIRE(driver);
  return std::move(*driver);
}

std::shared_ptr<const Devices> open_all() {
  auto devices = Devices::open(load());
  REQUIRE(devices);
  return std::move(*devices);
}

}  // namespace

TEST_CASE("Devices tell what they are and are found by UUID only") {
  Machine machine(kLibrary, gpus(2));
  {
    const auto devices = open_all();
    REQUIRE(devices->all().size() == 2);
    CHECK(devices->problems().empty());
    CHECK(machine->live().contexts == 2);
    const DeviceFacts& first = devices->all()[0]->facts();
    const DeviceFacts& second = devices->all()[1]->facts();
    CHECK(first.uuid != second.uuid);
    CHECK(first.uuid != Uuid{});
    CHECK(first.total_bytes == 64U << 20);
    CHECK_FALSE(first.name.empty());
    CHECK(first.pci_bus_id == "0000:01:00.0");
    CHECK(second.pci_bus_id == "0000:02:00.0");
    CHECK(first.sm_count > 0);
    CHECK(first.vmm);
    CHECK(first.vmm_fd);
    CHECK(first.fabric);
    CHECK(first.granularity >= 4096);
    CHECK(devices->find(second.uuid) == devices->all()[1]);
    CHECK(devices->find(Uuid{}) == nullptr);
    CHECK(devices->find(std::span(second.uuid).first(15)) == nullptr);
    CHECK(devices->find({}) == nullptr);
    const std::string text = to_string(second.uuid);
    CHECK(text.size() == 40);
    CHECK(text.starts_with("GPU-"));
    CHECK(text[12] == '-');
    CHECK(devices->all()[0]->free_bytes() == 64U << 20);
  }
  CHECK(machine->live().total() == 0);
}

TEST_CASE("A UUID says the same in a process that counts devices otherwise") {
  Uuid second{};
  {
    Machine machine(kLibrary, gpus(2));
    second = open_all()->all()[1]->facts().uuid;
  }
  Machine machine(kLibrary, gpus(2, {}, "1,0"));
  const auto devices = open_all();
  CHECK(devices->find(second) == devices->all()[0]);
}

TEST_CASE("A machine that lacks something says so, and one without a device has none") {
  {
    Machine machine(kLibrary, gpus(2, "fabric,peer"));
    const auto devices = open_all();
    CHECK_FALSE(devices->all()[0]->facts().fabric);
    CHECK(devices->all()[0]->facts().vmm_fd);
    CHECK(devices->all()[0]->reaches(*devices->all()[0]));
    CHECK_FALSE(devices->all()[0]->reaches(*devices->all()[1]));
    CHECK(devices->all()[0]->enable_peer(*devices->all()[1]).error().reason == "NO_PEER_ACCESS");
  }
  Machine machine(kLibrary, gpus(0));
  auto driver = cuda::Driver::load(kLibrary);
  if (driver) CHECK(Devices::open(*driver).error().reason == "NO_GPU");
}

TEST_CASE("Peers are enabled once or more often") {
  Machine machine(kLibrary, gpus(2));
  const auto devices = open_all();
  const Device& first = *devices->all()[0];
  const Device& second = *devices->all()[1];
  CHECK(first.reaches(second));
  CHECK(first.enable_peer(second));
  CHECK(first.enable_peer(second));
  CHECK(first.enable_peer(first));
}

TEST_CASE("A context is current for a scope, on the thread that made it so") {
  Machine machine(kLibrary, gpus(2));
  const auto devices = open_all();
  const cuda::Api& api = devices->driver().api();
  const auto current = [&] {
    cuda::CUcontext context = nullptr;
    CHECK(api.cuCtxGetCurrent(&context) == cuda::CUDA_SUCCESS);
    return context;
  };
  CHECK(current() == nullptr);
  {
    const Device::Current outer(*devices->all()[0]);
    REQUIRE(outer.ok());
    CHECK(current() == devices->all()[0]->context());
    {
      const Device::Current inner(*devices->all()[1]);
      CHECK(current() == devices->all()[1]->context());
    }
    CHECK(current() == devices->all()[0]->context());
    std::thread([&] { CHECK(current() == nullptr); }).join();
  }
  CHECK(current() == nullptr);
}

TEST_CASE("An error of a call has the driver's name, and leaves the device as it was") {
  Machine machine(kLibrary, gpus(1));
  const auto devices = open_all();
  const Device& device = *devices->all()[0];
  CHECK(device.check(cuda::CUDA_SUCCESS, "cuMemAlloc"));
  const Status full = device.check(cuda::CUDA_ERROR_OUT_OF_MEMORY, "cuMemAlloc");
  REQUIRE_FALSE(full);
  CHECK(full.error().code == Code::kResourceExhausted);
  CHECK(full.error().reason == "CUDA_OUT_OF_MEMORY");
  CHECK(full.error().message.starts_with("cuMemAlloc: "));
  const Status wrong = device.check(cuda::CUDA_ERROR_INVALID_VALUE, "cuMemFree");
  CHECK(wrong.error().code == Code::kInternal);
  CHECK(wrong.error().reason == "CUDA_INVALID_VALUE");
  CHECK(device.check(static_cast<cuda::CUresult>(4711), "cuX").error().reason == "CUDA_UNKNOWN");
  CHECK_FALSE(device.down());
}

TEST_CASE("A sticky error takes one device down for good, and the first reason stays") {
  Machine machine(kLibrary, gpus(2));
  const auto devices = open_all();
  const Device& device = *devices->all()[0];
  machine->fault(0, cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  const auto free = device.free_bytes();
  REQUIRE_FALSE(free);
  CHECK(free.error().code == Code::kUnavailable);
  CHECK(free.error().reason == "CUDA_ILLEGAL_ADDRESS");
  CHECK(device.down());
  (void)device.check(cuda::CUDA_ERROR_ECC_UNCORRECTABLE, "cuStreamQuery");
  CHECK(device.down_error().code == Code::kUnavailable);
  CHECK(device.down_error().reason == "GPU_DOWN");
  CHECK(device.down_error().message.find("CUDA_ILLEGAL_ADDRESS") != std::string::npos);
  CHECK_FALSE(devices->all()[1]->down());
  CHECK(devices->all()[1]->free_bytes());
}

TEST_CASE("Whichever call fails while devices are opened, nothing stays behind") {
  Machine machine(kLibrary, gpus(2));
  const auto driver = load();
  uint64_t count = 0;
  {
    const uint64_t before = machine->calls();
    const auto devices = Devices::open(driver);
    REQUIRE(devices);
    count = machine->calls() - before;
  }
  REQUIRE(count > 4);
  for (uint64_t n = 1; n <= count; ++n) {
    INFO("call " << n);
    machine->fail("", n, cuda::CUDA_ERROR_OUT_OF_MEMORY);
    {
      const auto devices = Devices::open(driver);
      // One device may be left, with the other one's error told.
      if (devices) CHECK((*devices)->all().size() + (*devices)->problems().size() == 2);
    }
    machine->fail("", 0, 0);
    CHECK(machine->live().total() == 0);
  }
}

}  // namespace kvferry::gpu
