// The daemon's end of one worker's control page: the status table that the worker reads without a
// call, the ring of changed slots, the doorbell, and the words that the worker advances. The memory
// format and the reader stand in proto/kvferry/control_page.h.
//
// publish, free_slot, tick, set_draining and ring_doorbell are called by one thread, the engine's.
// aux_of, load_timeline and store_done may be called from any thread. Nothing here ever blocks or
// depends on what the worker wrote: no index, size or pointer is read back from shared memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"
#include "daemon/memory/shared_memory.h"
#include "proto/kvferry/control_page.h"

namespace kvferry::rpc {

struct ControlPageConfig {
  uint32_t slots = 4096;          // open transfers of the worker; 1 ... control_page::kMaxSlots
  uint32_t ring_capacity = 8192;  // a power of two
  uint32_t aux_bytes = 512;       // longer aux is fetched by a call; a multiple of 8
  uint32_t timeline_words = 1024;
  uint32_t done_words = 1024;
};

// Told that slots have changed, by the engine's thread, or that the worker is gone, by any. Must
// not block, nor call the page back but for read() and draining().
class StatusObserver {
 public:
  virtual ~StatusObserver() = default;
  virtual void slot_changed(uint32_t slot) = 0;
  virtual void draining_changed() = 0;
  virtual void worker_gone() = 0;
};

class ControlPage {
 public:
  // What the worker is given at attach. Borrowed but for the doorbell end, which is the worker's
  // alone and is closed here once it has been sent.
  struct WorkerEnds {
    int status_fd = -1;
    int words_fd = -1;
    UniqueFd doorbell;
  };

  // Allocates and seals both files. Errors: INVALID_ARGUMENT CONTROL_PAGE_CONFIG, those of
  // memory::SharedMemory::create, INTERNAL CONTROL_PAGE_FAILED (descriptors exhausted).
  static Result<std::unique_ptr<ControlPage>> create(const ControlPageConfig& config,
                                                     const BootId& boot);
  ~ControlPage() = default;
  ControlPage(const ControlPage&) = delete;
  ControlPage& operator=(const ControlPage&) = delete;

  const ControlPageConfig& config() const { return config_; }
  uint64_t status_bytes() const { return status_.bytes(); }
  uint64_t words_bytes() const { return words_.bytes(); }
  // Once, before the page is used.
  WorkerEnds take_worker_ends();
  // The daemon's end of the doorbell, non-blocking; readable when the worker has rung. Borrowed.
  int doorbell_fd() const { return doorbell_.get(); }
  // Takes what the worker has rung; any thread, but one at a time.
  void drain_doorbell();

  // Shows `record` in `slot` (< config().slots, else nothing happens), notes the change, and rings
  // if the worker may be waiting for it (control_page::worth_waking).
  // `generation`, `changed_ns`, `aux_length` and the flags kAuxReady and kAuxByCall of `record` are
  // filled in here. `aux` may be null; given once, it stays readable until the slot is freed.
  void publish(uint32_t slot, control_page::Record record,
               std::shared_ptr<const std::string> aux = nullptr);
  // The transfer was closed: its aux goes, and the slot reads as free.
  void free_slot(uint32_t slot);
  // The daemon lives and its engine ticks.
  void tick(Time now);
  void set_draining(bool draining);
  // One byte, dropped when the worker has not taken the earlier ones: the table is the truth.
  void ring_doorbell();

  // Aux of a completed receive, for the call GetAux; null if there is none under this handle.
  std::shared_ptr<const std::string> aux_of(uint64_t client_handle) const KVFERRY_EXCLUDES(mutex_);
  // What is shown now, for tools. Any thread; false for a slot out of range or just being written.
  bool read(uint32_t slot, control_page::Record& out) const;

  bool draining() const { return draining_.load(std::memory_order_relaxed); }
  // Held weakly. RESOURCE_EXHAUSTED TOO_MANY_WATCHES beyond four at a time, UNAVAILABLE
  // WORKER_GONE.
  Status observe(const std::weak_ptr<StatusObserver>& observer) KVFERRY_EXCLUDES(observers_mutex_);
  void worker_gone() KVFERRY_EXCLUDES(observers_mutex_);

  // One atomic load of a word that the worker may change at any time; nothing for a word out of
  // range.
  std::optional<uint64_t> load_timeline(uint32_t word) const;
  // Sets a done word; false for a word out of range.
  bool store_done(uint32_t word, uint64_t value);

 private:
  ControlPage(const ControlPageConfig& config, memory::SharedMemory status,
              memory::SharedMemory words, UniqueFd doorbell, UniqueFd worker_doorbell);
  void write_header(const BootId& boot);
  void write_slot(uint32_t slot, const control_page::Record& record, std::string_view aux);
  enum class Ring : bool { kNo, kYes };
  void note_change(uint32_t slot, Ring ring);
  template <typename Fn>
  void tell(Fn&& what) KVFERRY_EXCLUDES(observers_mutex_);

  const ControlPageConfig config_;
  memory::SharedMemory status_;
  memory::SharedMemory words_;
  UniqueFd doorbell_;
  UniqueFd worker_doorbell_;
  control_page::StatusReader reader_;
  uint64_t slots_offset_ = 0;
  uint64_t ring_offset_ = 0;
  uint64_t aux_offset_ = 0;

  // The writer's private copy: what it wrote is never read back.
  struct Slot {
    uint64_t sequence = 0;
    uint64_t client_handle = 0;
    uint32_t generation = 0;
    uint32_t aux_length = 0;
    uint32_t aux_flags = 0;
    control_page::Record shown;  // the last one of this transfer
  };
  std::vector<Slot> slots_;
  uint64_t ring_head_ = 0;

  mutable Mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<const std::string>> aux_ KVFERRY_GUARDED_BY(mutex_);

  std::atomic<bool> draining_{false};
  std::atomic<uint32_t> observed_{0};  // so that a page that nobody watches costs one load
  Mutex observers_mutex_;
  std::vector<std::weak_ptr<StatusObserver>> observers_ KVFERRY_GUARDED_BY(observers_mutex_);
  bool gone_ KVFERRY_GUARDED_BY(observers_mutex_) = false;
};

}  // namespace kvferry::rpc
