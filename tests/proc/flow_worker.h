// One rank of a small inference engine over the C++ client: paged KV memory with an allocator of
// its own, and the engine's side of the contract. What matters: a page is given away, and
// overwritten, in the moment its RELEASED event is seen and never before, so that a release that
// came too early shows as wrong bytes at the receiver, and a late write as a free page that is not
// what it was.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "kvferry/client.h"

namespace kvferry::testing {

inline constexpr uint64_t kFlowBlock = 16;      // tokens
inline constexpr uint32_t kFlowHeads = 4;       // of the model, unless said otherwise
inline constexpr uint64_t kFlowCellBytes = 32;  // of one head and token, likewise

struct FlowGroup {
  std::vector<uint32_t> layers{0, 1};
  uint64_t window = 0;
  // Recurrent: one page a request, which each pass overwrites and only the last slice sends.
  bool state = false;
};

class FlowWorker {
 public:
  struct Options {
    std::string socket;
    std::string instance;
    uint32_t rank = 0;
    uint32_t ranks = 1;  // tensor parallel
    std::vector<FlowGroup> groups{FlowGroup{}};
    uint32_t blocks = 64;     // of each group; id 0 is the engine's null block
    std::string hash_scheme;  // of reuse
    uint32_t heads = kFlowHeads;
    uint64_t cell_bytes = kFlowCellBytes;
  };
  explicit FlowWorker(Options options);  // throws std::runtime_error
  ~FlowWorker();

  client::Client& client() { return *client_; }
  client::LayoutRef layout() const { return {options_.instance, options_.rank}; }
  const client::RegisteredLayout& registered() const { return registered_; }
  const std::vector<FlowGroup>& groups() const { return options_.groups; }
  // Detaches at once, as a process that dies.
  void die();
  // Takes its layout back, or its pools and the layout with them. All pages are free when it
  // returns, whatever held them before.
  void unregister(bool with_pools);
  // The same layout again, with new pools if they were taken back.
  void register_again();
  // Takes the memory of its pools away from under the daemon; it reads as zeros here.
  void punch();

  // ---- pages: ids by group
  using Pages = std::vector<std::vector<int32_t>>;
  Pages allocate(uint64_t tokens);
  // Gives pages back that no transfer holds.
  void give_back(const Pages& pages);
  std::size_t free_pages() const;
  // Writes, or compares, the cells of tokens [begin, end) of a request. Blocks that are null (0) in
  // `pages` are passed over.
  void compute(uint64_t request, const Pages& pages, uint64_t begin, uint64_t end);
  bool holds(uint64_t request, const Pages& pages, uint32_t group, uint64_t begin,
             uint64_t end) const;
  // Every free page is as it was left. Throws.
  void check_free_pages() const;

  // ---- transfers: pages belong to one from the call until RELEASED
  client::TransferHandle open_send(const client::TransferKey& key,
                                   std::chrono::milliseconds lease = {});
  // Tokens [begin, end) of a prompt of `prompt`; `pages` are those of the whole prompt so far.
  client::TransferHandle send(const client::TransferKey& key, uint32_t index, const Pages& pages,
                              uint64_t begin, uint64_t end, uint64_t prompt, bool last,
                              const std::function<void(client::SendRequest&)>& more = {});
  client::TransferHandle receive(const client::TransferKey& key, const std::string& ticket,
                                 const Pages& pages, uint64_t prompt,
                                 const std::vector<uint64_t>& cached = {},
                                 const std::function<void(client::ReceiveRequest&)>& more = {});
  // The pages of this transfer are given back at its RELEASED.
  void hold(client::TransferHandle transfer, const Pages& pages);
  // A prefix cache: the pages stay the caller's after RELEASED, until give_back().
  void keep(client::TransferHandle transfer) { held_.erase(transfer); }
  // A Revoke has given these back.
  void revoked(client::TransferHandle transfer, const Pages& pages);

  // What has been told of a transfer.
  struct Told {
    uint32_t receiver_ready = 0;
    uint32_t source_released = 0;
    uint32_t dest_released = 0;
    uint32_t completed = 0;
    uint32_t delivered = 0;
    uint32_t failed = 0;
    uint32_t cancelled = 0;
    std::string reason;  // of the end
    std::optional<client::Error> rejected;
    bool over() const {
      return (completed + delivered + failed + cancelled > 0 &&
              source_released + dest_released > 0) ||
             rejected.has_value();
    }
  };
  const Told& told(client::TransferHandle transfer) { return told_[transfer]; }
  // Takes the events that are there; one step of an engine's loop.
  void step();
  // Called for a receiver at COMPLETED, before anything is given back.
  void on_completed(client::TransferHandle transfer, std::function<void()> what) {
    completed_[transfer] = std::move(what);
  }
  uint32_t daemon_restarts() const { return restarts_; }
  uint32_t reattached() const { return reattached_; }

 private:
  void make_pools();
  uint64_t block_tokens(uint32_t group) const;
  std::byte* page(uint32_t group, int32_t id) const;
  uint64_t page_bytes(uint32_t group) const;
  void poison(uint32_t group, int32_t id);
  template <typename Fn>
  void for_each_cell(const Pages& pages, uint32_t group, uint64_t begin, uint64_t end,
                     Fn&& fn) const;
  void release(client::TransferHandle transfer);

  Options options_;
  uint32_t heads_ = 0;
  std::unique_ptr<client::Client> client_;
  client::LayoutRegistration registration_;
  client::RegisteredLayout registered_;
  std::vector<client::PoolMemory> pools_;
  std::vector<std::set<int32_t>> free_;
  std::map<client::TransferHandle, std::vector<std::set<int32_t>>> held_;
  std::map<client::TransferHandle, Told> told_;
  std::map<client::TransferHandle, std::function<void()>> completed_;
  uint32_t restarts_ = 0;
  uint32_t reattached_ = 0;
};

// Steps all workers until it is so; throws after `limit`.
void run_until(const std::vector<FlowWorker*>& workers, const std::function<bool()>& done,
               std::chrono::milliseconds limit = std::chrono::seconds(30));

}  // namespace kvferry::testing
