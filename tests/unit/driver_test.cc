#include "kernels/cuda/driver.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>

#include "tests/fake_cuda/control.h"

using namespace kvferry;
using Catch::Matchers::Contains;
using fake_cuda::Machine;

TEST_CASE("A driver that is there is loaded with all its functions") {
  const Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.devices = 2});
  const auto driver = cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY);
  REQUIRE(driver);
  CHECK((*driver)->version() == 13000);
  CHECK((*driver)->version_text() == "13.0");
  CHECK((*driver)->library() == KVFERRY_FAKE_CUDA_LIBRARY);
  const cuda::Api& api = (*driver)->api();
#define KVFERRY_CHECK_FOUND(name, symbol, version, need, parameters) CHECK(api.name != nullptr);
  KVFERRY_CUDA_FUNCTIONS(KVFERRY_CHECK_FOUND)
#undef KVFERRY_CHECK_FOUND
  int count = 0;
  CHECK(api.cuDeviceGetCount(&count) == cuda::CUDA_SUCCESS);
  CHECK(count == 2);
}

TEST_CASE("A library that is not there is an error that names it") {
  const auto driver = cuda::Driver::load("libno-such-cuda.so.1");
  REQUIRE_FALSE(driver);
  CHECK(driver.error().code == cuda::CUDA_ERROR_FILE_NOT_FOUND);
  CHECK(driver.error().call == "dlopen");
  CHECK_THAT(driver.error().to_string(), Contains("dlopen: no CUDA driver: libno-such-cuda.so.1"));
}

TEST_CASE("A library that is no driver is refused") {
  const auto driver = cuda::Driver::load("libm.so.6");
  REQUIRE_FALSE(driver);
  CHECK(driver.error().code == cuda::CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND);
  CHECK(driver.error().to_string() == "cuGetProcAddress: libm.so.6 is no CUDA driver");
}

TEST_CASE("A driver that lacks functions is refused with their names") {
  const Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.version = 10010});
  const auto driver = cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY);
  REQUIRE_FALSE(driver);
  CHECK(driver.error().code == cuda::CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND);
  CHECK_THAT(driver.error().message,
             Contains("(CUDA 10.1) lacks") && Contains("cuMemCreate of CUDA 10.2") &&
                 Contains("cuDeviceGetUuid of CUDA 11.4") && !Contains("cuStreamWriteValue64") &&
                 !Contains("cuInit") && Contains("a newer driver is needed"));
}

TEST_CASE("Functions that may be missing are null") {
  const Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.version = 11040});
  const auto driver = cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY);
  REQUIRE(driver);
  CHECK((*driver)->version_text() == "11.4");
  CHECK((*driver)->api().cuStreamWriteValue64 == nullptr);
  CHECK((*driver)->api().cuStreamWaitValue64 == nullptr);
  CHECK((*driver)->api().cuMemCreate != nullptr);
}

TEST_CASE("What cuInit answers is the error, in the driver's words") {
  const Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.visible = "7"});
  const auto driver = cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY);
  REQUIRE_FALSE(driver);
  CHECK(driver.error().code == cuda::CUDA_ERROR_NO_DEVICE);
  CHECK(driver.error().to_string() ==
        "cuInit: CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected");

  machine->fail("cuInit", 1, cuda::CUDA_ERROR_SYSTEM_NOT_READY);
  CHECK(cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY).error().code ==
        cuda::CUDA_ERROR_SYSTEM_NOT_READY);
}

TEST_CASE("Errors have names, also those that the driver does not know") {
  const Machine machine(KVFERRY_FAKE_CUDA_LIBRARY);
  const auto driver = cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY);
  REQUIRE(driver);
  CHECK((*driver)->name_of(cuda::CUDA_ERROR_OUT_OF_MEMORY) == "CUDA_ERROR_OUT_OF_MEMORY");
  CHECK((*driver)->error(cuda::CUDA_ERROR_OUT_OF_MEMORY, "cuMemAlloc").to_string() ==
        "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory");
  CHECK((*driver)->error(static_cast<cuda::CUresult>(4711), "cuMemAlloc").to_string() ==
        "cuMemAlloc: CUDA error 4711 (4711): unknown to this driver");
}
