// What `kvferry-rails --capabilities` answers.
#include "daemon/rails/rails_capabilities.h"
#include "tests/fuzz/input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  using namespace kvferry;
  const auto parsed = rails::parse_capabilities(fuzz::text_of({data, size}));
  if (!parsed) return 0;
  FUZZ_CHECK(!parsed->ucx_version.empty() && parsed->has_cuda() == parsed->cuda_missing.empty(),
             "what is taken does not contradict itself");
  return 0;
}
