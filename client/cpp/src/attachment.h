// The worker's end of a lifeline: one attachment to one daemon, with the control page it mapped.
// Knows nothing of gRPC. Immutable after connect but for the memory that the daemon writes;
// send_pools takes its own lock, everything may be called from any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/unique_fd.h"
#include "kvferry/result.h"
#include "kvferry/types.h"
#include "proto/kvferry/control_page.h"
#include "proto/kvferry/lifeline.h"

namespace kvferry::client {

// A descriptor that is close-on-exec and is closed in forked children too.
class GuardedFd {
 public:
  GuardedFd() = default;
  explicit GuardedFd(UniqueFd fd);
  ~GuardedFd() { reset(); }
  GuardedFd(GuardedFd&& other) noexcept = default;
  GuardedFd& operator=(GuardedFd&& other) noexcept;
  int get() const { return fd_.get(); }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  void reset();

 private:
  UniqueFd fd_;
};

// The mapped words of a control page. It may outlive its attachment: streams of a GPU may still
// write to words of a daemon that is gone.
class WordsFile {
 public:
  WordsFile(std::span<std::byte> mapped, uint32_t timeline_words, uint32_t done_words);
  ~WordsFile();
  WordsFile(const WordsFile&) = delete;
  WordsFile& operator=(const WordsFile&) = delete;

  std::span<std::byte> bytes() const { return bytes_; }
  uint32_t timeline_words() const { return timeline_words_; }
  uint32_t done_words() const { return done_words_; }
  // Null for one out of range.
  uint64_t* timeline_word(uint32_t word) const;
  uint64_t* done_word(uint32_t word) const;
  // The daemon's process has ended: what waits for one of its words goes on.
  void release_waiters() const;

 private:
  const std::span<std::byte> bytes_;
  const uint32_t timeline_words_;
  const uint32_t done_words_;
  const uint64_t fork_generation_;
};

struct PoolToSend {
  std::string name;
  lifeline::PoolKind kind = lifeline::PoolKind::kHostShm;
  uint64_t bytes = 0;
  int fd = -1;
  uint32_t part = 0;  // of kCudaVmmFd: several make up one pool
};

// Why a process of uid `listener` is not taken for the daemon at a socket of uid `owner`; empty if
// it is. `overflow`: as which every user appears that this user namespace does not map. Without
// `wanted` such a one cannot be compared and passes.
std::string why_not_served(uint32_t owner, uint32_t listener, uint32_t overflow,
                           std::optional<uint32_t> wanted);

class Attachment {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  // Connects and attaches; blocks at most options.attach_timeout. Errors as Client::attach.
  static Result<std::shared_ptr<Attachment>> connect(const AttachOptions& options);
  ~Attachment();
  Attachment(const Attachment&) = delete;
  Attachment& operator=(const Attachment&) = delete;

  const lifeline::AttachReply& facts() const { return facts_; }
  std::string token() const;
  std::string grpc_path() const;
  Bytes16 boot_id() const;
  const control_page::StatusReader& page() const { return reader_; }
  // Timeline words, then done words; null for one out of range.
  uint64_t* timeline_word(uint32_t word) const { return words_->timeline_word(word); }
  uint64_t* done_word(uint32_t word) const { return words_->done_word(word); }
  const std::shared_ptr<const WordsFile>& words() const { return words_; }

  int lifeline_fd() const { return lifeline_.get(); }
  int daemon_pidfd() const { return daemon_.get(); }
  int doorbell_fd() const { return doorbell_.get(); }
  bool daemon_exited() const;
  // Tells the daemon to look at the words; dropped when it has not taken the earlier ones.
  void ring() const;
  void drain_doorbell() const;

  // Hands descriptors to the daemon and waits for its answer.
  Status send_pools(std::span<const PoolToSend> pools, Deadline deadline);

 private:
  Attachment() = default;
  Status open(const lifeline::AttachReply& reply, std::vector<UniqueFd> fds);
  Status send_some(std::span<const PoolToSend> pools, Deadline deadline);

  lifeline::AttachReply facts_{};
  GuardedFd lifeline_;
  GuardedFd daemon_;
  GuardedFd doorbell_;
  GuardedFd status_fd_;
  GuardedFd words_fd_;
  std::span<const std::byte> status_;
  std::shared_ptr<const WordsFile> words_;
  control_page::StatusReader reader_;
  uint64_t fork_generation_ = 0;
  Mutex send_mutex_;  // one question and its answer at a time
};

}  // namespace kvferry::client
