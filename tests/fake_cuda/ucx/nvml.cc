// libnvidia-ml.so.1 for UCX's CUDA module, which is linked with it. It is asked for links between
// devices that cuda_ipc would use, and says that there is nothing.
namespace {

constexpr int kNvmlErrorNotSupported = 3;

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* nvmlErrorString(int /*result*/) {
  return "not supported by the fake driver";
}

extern "C" __attribute__((visibility("default"))) int nvmlInit_v2() {
  return kNvmlErrorNotSupported;
}
