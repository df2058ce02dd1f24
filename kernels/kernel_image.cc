// The kernels' binary, as nvcc made it, or a mark where there was no nvcc.
#include "kernels/device_copy.h"

namespace kvferry::kernels {

#if defined(KVFERRY_KERNEL_IMAGE)

// The assembler reads the file: no compiler has to digest a literal of that size.
asm(".pushsection .rodata\n"
    ".balign 16\n"
    ".local kvferry_kernel_image_begin, kvferry_kernel_image_end\n"
    "kvferry_kernel_image_begin:\n"
    ".incbin \"" KVFERRY_KERNEL_IMAGE
    "\"\n"
    "kvferry_kernel_image_end:\n"
    ".byte 0\n"
    ".popsection\n");

extern "C" {
extern const unsigned char kvferry_kernel_image_begin[];
extern const unsigned char kvferry_kernel_image_end[];
}

std::span<const unsigned char> kernel_image() {
  return {kvferry_kernel_image_begin, kvferry_kernel_image_end};
}
bool kernels_built() {
  return true;
}

#else

namespace {
constexpr unsigned char kMark[] = "kvferry: built without CUDA kernels";
}  // namespace

std::span<const unsigned char> kernel_image() {
  return kMark;
}
bool kernels_built() {
  return false;
}

#endif

}  // namespace kvferry::kernels
