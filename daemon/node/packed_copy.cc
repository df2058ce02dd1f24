#include "daemon/node/packed_copy.h"

#include <utility>

#include "daemon/mapping/packed.h"
#include "daemon/memory/host_pool.h"

namespace kvferry::node {
namespace {

Result<std::shared_ptr<const CompiledPlan>> compiled(std::shared_ptr<const RegisteredLayout> layout,
                                                     mapping::Plan plan) {
  auto out = std::make_shared<CompiledPlan>();
  out->layout = std::move(layout);
  out->bytes = plan.bytes();
  out->plan = std::make_shared<const mapping::Plan>(std::move(plan));
  KVFERRY_RETURN_IF_ERROR(out->make_device_forms());
  return std::shared_ptr<const CompiledPlan>(std::move(out));
}

}  // namespace

Result<PackedPlan> prepare_packed(const engine::SendOp& send) {
  const auto pages = std::dynamic_pointer_cast<const RegisteredLayout>(send.layout);
  if (pages == nullptr) return fail(Code::kInternal, "NO_LAYOUT", "a packed copy is of a layout");
  auto shape = mapping::packed_shape(pages->layout, send.offer, send.layers);
  KVFERRY_RETURN_IF_ERROR(shape);
  auto copy = mapping::bind_packed(pages->layout, send.blocks, send.offer, send.layers, *shape);
  KVFERRY_RETURN_IF_ERROR(copy);
  auto memory = memory::HostPool::create(shape->bytes);
  KVFERRY_RETURN_IF_ERROR(memory);

  auto layout = std::make_shared<RegisteredLayout>();
  static_cast<engine::LayoutHandle&>(*layout) = *pages;
  layout->arena = 0;  // it is in host memory, wherever the pages are
  layout->layout = std::move(shape->layout);
  layout->pools.push_back(std::move(*memory));
  PackedPlan out;
  out.layout = layout;
  out.blocks = std::move(shape->blocks);
  auto source = compiled(pages, std::move(copy->source));
  KVFERRY_RETURN_IF_ERROR(source);
  auto destination = compiled(std::move(layout), std::move(copy->destination));
  KVFERRY_RETURN_IF_ERROR(destination);
  out.source = std::move(*source);
  out.destination = std::move(*destination);
  return out;
}

}  // namespace kvferry::node
