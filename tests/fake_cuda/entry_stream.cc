// Streams, events, and the work that copies, fills and waits.
#include <atomic>
#include <cstring>

#include "tests/fake_cuda/entry.h"

namespace kvferry::fake_cuda {
namespace {

CUresult create_stream(const char* name, CUstream* stream, unsigned int flags) {
  return call(name, Needs::kContext, [&](Call& c) {
    if (stream == nullptr || (flags & ~CU_STREAM_NON_BLOCKING) != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    auto made = std::make_shared<Stream>();
    made->handle = c.state.new_handle<CUstream>();
    made->context = c.context;
    made->blocking = flags == CU_STREAM_DEFAULT;
    *stream = made->handle;
    c.state.streams[*stream] = std::move(made);
    return CUDA_SUCCESS;
  });
}

// Calls that put work on a stream of the current context.
template <typename Fn>
CUresult stream_call(const char* name, CUstream handle, Fn&& fn) {
  return call(name, Needs::kContext, [&](Call& c) {
    const std::shared_ptr<Stream> stream = c.state.stream_of(c.context, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    return fn(c, stream);
  });
}

bool is_device_address(const Call& c, CUdeviceptr address) {
  return c.state.space.find(address) != nullptr;
}

// A 64-bit word that a stream's work may use, as the host sees it; null if it may not.
std::atomic<uint64_t>* word_at(const DeviceView& view, uint64_t address) {
  return reinterpret_cast<std::atomic<uint64_t>*>(view.writable(address, sizeof(uint64_t)));
}

bool holds(uint64_t word, uint64_t value, unsigned int how) {
  switch (how) {
    case CU_STREAM_WAIT_VALUE_GEQ:
      return static_cast<int64_t>(word - value) >= 0;
    case CU_STREAM_WAIT_VALUE_EQ:
      return word == value;
    case CU_STREAM_WAIT_VALUE_AND:
      return (word & value) != 0;
    default:
      return ~(word | value) != 0;
  }
}

bool completed(const Event& event) {
  return event.counter->completed.load(std::memory_order_acquire) >=
         event.counter->recorded.load(std::memory_order_acquire);
}

}  // namespace

CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
  return create_stream("cuStreamCreate", stream, flags);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int /*priority*/) {
  return create_stream("cuStreamCreateWithPriority", stream, flags);
}

// Work that it still has is done all the same.
CUresult cuStreamDestroy_v2(CUstream stream) {
  return call("cuStreamDestroy", Needs::kContext, [&](Call& c) {
    const auto found = c.state.streams.find(stream);
    if (found == c.state.streams.end() || found->second->context != c.context) {
      return CUDA_ERROR_INVALID_HANDLE;
    }
    c.state.streams.erase(found);
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamQuery(CUstream handle) {
  return stream_call("cuStreamQuery", handle, [&](Call&, const std::shared_ptr<Stream>& stream) {
    return stream->done == stream->submitted ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
  });
}

CUresult cuStreamSynchronize(CUstream handle) {
  return stream_call("cuStreamSynchronize", handle,
                     [&](Call& c, const std::shared_ptr<Stream>& stream) {
                       return c.state.wait_for(c.lock, c.context, {stream});
                     });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned int flags) {
  return stream_call("cuStreamWaitEvent", handle,
                     [&](Call& c, const std::shared_ptr<Stream>& stream) {
                       const auto found = c.state.events.find(event);
                       if (found == c.state.events.end()) return CUDA_ERROR_INVALID_HANDLE;
                       if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
                       // For what is recorded now, not for what comes.
                       const auto counter = found->second.counter;
                       const uint64_t target = counter->recorded.load(std::memory_order_acquire);
                       Work work;
                       work.ready = [counter, target] {
                         return counter->completed.load(std::memory_order_acquire) >= target;
                       };
                       work.run = [](const DeviceView&) { return CUDA_SUCCESS; };
                       c.state.submit(stream, std::move(work));
                       return CUDA_SUCCESS;
                     });
}

CUresult cuEventCreate(CUevent* event, unsigned int flags) {
  return call("cuEventCreate", Needs::kContext, [&](Call& c) {
    constexpr unsigned int kKnown =
        CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
    if (event == nullptr || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
    Event made;
    made.context = c.context;
    made.flags = flags;
    if ((flags & CU_EVENT_INTERPROCESS) != 0) {
      if (!c.state.config().has("ipc_events")) return CUDA_ERROR_NOT_SUPPORTED;
      if ((flags & CU_EVENT_DISABLE_TIMING) == 0) return CUDA_ERROR_INVALID_VALUE;
      auto counter = c.state.machine->create_event(made.id);
      if (!counter) return counter.error();
      made.counter = std::move(*counter);
    } else {
      made.counter = std::make_shared<EventCounter>();
    }
    *event = c.state.new_handle<CUevent>();
    c.state.events[*event] = std::move(made);
    return CUDA_SUCCESS;
  });
}

CUresult cuEventRecord(CUevent event, CUstream handle) {
  return stream_call("cuEventRecord", handle, [&](Call& c, const std::shared_ptr<Stream>& stream) {
    const auto found = c.state.events.find(event);
    if (found == c.state.events.end() || found->second.context != c.context) {
      return CUDA_ERROR_INVALID_HANDLE;
    }
    const auto counter = found->second.counter;
    const uint64_t number = counter->recorded.fetch_add(1, std::memory_order_acq_rel) + 1;
    Work work;
    work.run = [counter, number](const DeviceView&) {
      uint64_t before = counter->completed.load(std::memory_order_acquire);
      while (before < number && !counter->completed.compare_exchange_weak(before, number)) {
      }
      return CUDA_SUCCESS;
    };
    c.state.submit(stream, std::move(work));
    return CUDA_SUCCESS;
  });
}

CUresult cuEventQuery(CUevent event) {
  return call("cuEventQuery", Needs::kContext, [&](Call& c) {
    const auto found = c.state.events.find(event);
    if (found == c.state.events.end()) return CUDA_ERROR_INVALID_HANDLE;
    // The error of the device that it is on, whatever is current.
    const CUresult sticky = c.state.sticky_error(*found->second.context);
    if (sticky != CUDA_SUCCESS) return sticky;
    return completed(found->second) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
  });
}

CUresult cuEventSynchronize(CUevent event) {
  return call("cuEventSynchronize", Needs::kContext, [&](Call& c) {
    const auto found = c.state.events.find(event);
    if (found == c.state.events.end()) return CUDA_ERROR_INVALID_HANDLE;
    const auto counter = found->second.counter;
    const std::shared_ptr<Context> context = found->second.context;
    const uint64_t target = counter->recorded.load(std::memory_order_acquire);
    while (counter->completed.load(std::memory_order_acquire) < target) {
      if (context->retains == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
      const CUresult sticky = c.state.sticky_error(*context);
      if (sticky != CUDA_SUCCESS) return sticky;
      // Another process does not say when its events are complete.
      c.state.work_done.wait_for(c.lock, std::chrono::milliseconds(1));
    }
    return CUDA_SUCCESS;
  });
}

CUresult cuEventDestroy_v2(CUevent event) {
  return call("cuEventDestroy", Needs::kContext, [&](Call& c) {
    const auto found = c.state.events.find(event);
    if (found == c.state.events.end()) return CUDA_ERROR_INVALID_HANDLE;
    const Event& gone = found->second;
    if (gone.id != 0 && !gone.opened) c.state.machine->remove_event(gone.id);
    c.state.events.erase(found);
    return CUDA_SUCCESS;
  });
}

// From registered memory the bytes are read when the work is done, from other memory now.
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream handle) {
  return stream_call("cuMemcpyHtoDAsync", handle,
                     [&](Call& c, const std::shared_ptr<Stream>& stream) {
                       if (bytes == 0) return CUDA_SUCCESS;
                       if (from == nullptr || !is_device_address(c, to))
                         return CUDA_ERROR_INVALID_VALUE;
                       const auto* source = static_cast<const std::byte*>(from);
                       std::vector<std::byte> staged;
                       if (const Range* range = c.state.space.registered(from, bytes)) {
                         if (range->device_mapped) {
                           const auto offset = static_cast<uint64_t>(source - range->host);
                           Work work;
                           work.on_device = true;
                           work.run = [=, at = range->base + offset](const DeviceView& view) {
                             const std::byte* pinned = view.readable(at, bytes);
                             std::byte* target = view.writable(to, bytes);
                             if (pinned == nullptr || target == nullptr)
                               return CUDA_ERROR_ILLEGAL_ADDRESS;
                             std::memcpy(target, pinned, bytes);
                             return CUDA_SUCCESS;
                           };
                           c.state.submit(stream, std::move(work));
                           return CUDA_SUCCESS;
                         }
                       }
                       staged.assign(source, source + bytes);
                       Work work;
                       work.on_device = true;
                       work.run = [to, staged = std::move(staged)](const DeviceView& view) {
                         std::byte* target = view.writable(to, staged.size());
                         if (target == nullptr) return CUDA_ERROR_ILLEGAL_ADDRESS;
                         std::memcpy(target, staged.data(), staged.size());
                         return CUDA_SUCCESS;
                       };
                       c.state.submit(stream, std::move(work));
                       return CUDA_SUCCESS;
                     });
}

// To memory that is not registered it waits for the end, as the driver does.
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream handle) {
  return stream_call("cuMemcpyDtoHAsync", handle,
                     [&](Call& c, const std::shared_ptr<Stream>& stream) {
                       if (bytes == 0) return CUDA_SUCCESS;
                       if (to == nullptr || !is_device_address(c, from))
                         return CUDA_ERROR_INVALID_VALUE;
                       const bool pinned = c.state.space.registered(to, bytes) != nullptr;
                       Work work;
                       work.on_device = true;
                       work.run = [=](const DeviceView& view) {
                         const std::byte* source = view.readable(from, bytes);
                         if (source == nullptr) return CUDA_ERROR_ILLEGAL_ADDRESS;
                         std::memcpy(to, source, bytes);
                         return CUDA_SUCCESS;
                       };
                       c.state.submit(stream, std::move(work));
                       return pinned ? CUDA_SUCCESS : c.state.wait_for(c.lock, c.context, {stream});
                     });
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle) {
  return stream_call("cuMemcpyDtoDAsync", handle,
                     [&](Call& c, const std::shared_ptr<Stream>& stream) {
                       if (bytes == 0) return CUDA_SUCCESS;
                       if (!is_device_address(c, to) || !is_device_address(c, from)) {
                         return CUDA_ERROR_INVALID_VALUE;
                       }
                       Work work;
                       work.on_device = true;
                       work.run = [=](const DeviceView& view) {
                         const std::byte* source = view.readable(from, bytes);
                         std::byte* target = view.writable(to, bytes);
                         if (source == nullptr || target == nullptr)
                           return CUDA_ERROR_ILLEGAL_ADDRESS;
                         std::memmove(target, source, bytes);
                         return CUDA_SUCCESS;
                       };
                       c.state.submit(stream, std::move(work));
                       return CUDA_SUCCESS;
                     });
}

// As that many copies, which is one of the orders that it promises.
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr* to, CUdeviceptr* from, size_t* bytes, size_t count,
                               CUmemcpyAttributes* attributes, size_t* first_of_attributes,
                               size_t attribute_count, CUstream handle) {
  if (count == 0 || to == nullptr || from == nullptr || bytes == nullptr || attributes == nullptr ||
      first_of_attributes == nullptr || attribute_count == 0 || attribute_count > count ||
      first_of_attributes[0] != 0 ||
      attributes[0].srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM)
    return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < count; ++i) {
    const CUresult result = cuMemcpyDtoDAsync_v2(to[i], from[i], bytes[i], handle);
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream handle) {
  return stream_call("cuMemsetD8Async", handle,
                     [&](Call& c, const std::shared_ptr<Stream>& stream) {
                       if (bytes == 0) return CUDA_SUCCESS;
                       if (!is_device_address(c, to)) return CUDA_ERROR_INVALID_VALUE;
                       Work work;
                       work.on_device = true;
                       work.run = [=](const DeviceView& view) {
                         std::byte* target = view.writable(to, bytes);
                         if (target == nullptr) return CUDA_ERROR_ILLEGAL_ADDRESS;
                         std::memset(target, value, bytes);
                         return CUDA_SUCCESS;
                       };
                       c.state.submit(stream, std::move(work));
                       return CUDA_SUCCESS;
                     });
}

CUresult cuStreamWriteValue64_v2(CUstream handle, CUdeviceptr address, cuuint64_t value,
                                 unsigned int flags) {
  return stream_call("cuStreamWriteValue64", handle,
                     [&](Call& c, const std::shared_ptr<Stream>& stream) {
                       if (!c.state.config().has("stream_words")) return CUDA_ERROR_NOT_SUPPORTED;
                       if (flags != CU_STREAM_WRITE_VALUE_DEFAULT || address % sizeof value != 0 ||
                           !is_device_address(c, address)) {
                         return CUDA_ERROR_INVALID_VALUE;
                       }
                       Work work;
                       work.on_device = true;
                       work.run = [=](const DeviceView& view) {
                         auto* word = word_at(view, address);
                         if (word == nullptr) return CUDA_ERROR_ILLEGAL_ADDRESS;
                         word->store(value, std::memory_order_release);
                         return CUDA_SUCCESS;
                       };
                       c.state.submit(stream, std::move(work));
                       return CUDA_SUCCESS;
                     });
}

CUresult cuStreamWaitValue64_v2(CUstream handle, CUdeviceptr address, cuuint64_t value,
                                unsigned int flags) {
  return stream_call(
      "cuStreamWaitValue64", handle, [&](Call& c, const std::shared_ptr<Stream>& stream) {
        if (!c.state.config().has("stream_words")) return CUDA_ERROR_NOT_SUPPORTED;
        if (flags > CU_STREAM_WAIT_VALUE_NOR || address % sizeof value != 0 ||
            !is_device_address(c, address)) {
          return CUDA_ERROR_INVALID_VALUE;
        }
        Work work;
        // An address that has gone lets it begin, and fail.
        work.ready = [=, &all = c.state, context = c.context] {
          const std::shared_lock<std::shared_mutex> unchanged(all.map_mutex);
          const auto* word =
              word_at(DeviceView(all.space, context->device, context->peers), address);
          return word == nullptr || holds(word->load(std::memory_order_acquire), value, flags);
        };
        work.run = [=](const DeviceView& view) {
          return word_at(view, address) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
        };
        c.state.submit(stream, std::move(work));
        return CUDA_SUCCESS;
      });
}

}  // namespace kvferry::fake_cuda
