// The node's reuse index: which blocks of local workers hold which part of which prompt, who reads
// them now and who is about to write them. Part of Core.
//
// Publishing and reading are two things. An entry lets a block be found; it goes the moment that
// its worker withdraws it, a receive is to write it or its layout goes. Reads are counted by place,
// whatever became of the entry: copies that have been promised the block and pins. Who wants the
// block's memory waits until nobody reads it, and as nobody finds it any more that only gets less.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "daemon/engine/events.h"
#include "daemon/engine/reuse_types.h"
#include "daemon/engine/timers.h"

namespace kvferry::engine {

class Core;
struct Receive;

class ReuseIndex {
 public:
  explicit ReuseIndex(Core& core) : core_(core) {}

  // Calls of workers.
  void commit(Receive& receive, const CommitReuseOp& op);
  void lookup(const LookupReuseOp& op);
  void withdraw(const WithdrawReuseOp& op);

  void worker_gone(WorkerId worker);
  // Its blocks are found no more; copies that were promised some still read them.
  void layout_gone(const LayoutHandle* layout);
  bool reads(const LayoutHandle* layout) const;
  void forget(const LayoutHandle* layout);  // it is quiet

  // Whether prompt hashes cannot be looked up; then the call has its answer.
  bool bad_groups(const OpRef& op, const LayoutHandle& layout,
                  const std::vector<PromptHashes>& groups);

  // For receives. The place of a block of a layout that takes part in reuse.
  BlockPlace place(const std::shared_ptr<const LayoutHandle>& layout, uint32_t group,
                   int32_t block);
  // A block that holds what `group` of `who` needs: `own` if it does, else one that is not among
  // `taken`, the places that the asking receive is to write. Only a few holders are tried: whoever
  // commits one hash for many blocks costs nobody time, and may hide a block that would serve.
  std::optional<ReuseHolder> find(const LayoutHandle& who, uint32_t group, const std::string& hash,
                                  uint64_t pin, const std::optional<BlockPlace>& own,
                                  const std::set<BlockPlace>& taken) const;
  void drop_pin(WorkerId worker, uint64_t pin);
  void read(const BlockPlace& place) { ++readers_[place]; }
  void read_ended(const BlockPlace& place);
  bool is_read(const BlockPlace& place) const { return readers_.contains(place); }
  // From now until write_ended() the block is neither found nor published.
  void write(const BlockPlace& place);
  void write_ended(const BlockPlace& place);

  void timer(TimerKey key);
  // True, once, if some place has lost its last reader.
  bool take_news() { return std::exchange(news_, false); }
  // Answers withdrawals that nobody stands in the way of any more.
  void flush();

  std::size_t entries() const { return entries_.size(); }
  std::size_t pins() const { return pins_.size(); }
  void check_invariants() const;

 private:
  struct Entry {
    ReuseKey key;
    uint32_t group = 0;
    uint64_t order = 0;  // of its commit
  };
  struct Known {
    std::shared_ptr<const LayoutHandle> layout;
    bool leaving = false;
  };
  struct Pin {
    WorkerId worker;
    std::map<ReuseKey, std::vector<ReuseHolder>> holders;
  };
  struct Withdrawal {
    OpRef op;
    std::set<BlockPlace> places;  // still read
    uint32_t count = 0;
  };

  uint64_t number(const std::shared_ptr<const LayoutHandle>& layout);
  bool publish(const std::shared_ptr<const LayoutHandle>& layout, const BlockPlace& place,
               Entry entry);
  bool unpublish(const BlockPlace& place);
  void unpublish_all(uint64_t layout);
  const char* commit_problem(const Receive& receive, const CommitReuseOp& op, std::size_t i,
                             std::string& field);

  Core& core_;
  std::map<uint64_t, Known> layouts_;
  std::map<const LayoutHandle*, uint64_t> numbers_;  // looked up only, never walked
  std::map<BlockPlace, Entry> entries_;
  std::map<ReuseKey, std::set<BlockPlace>> holders_;
  std::map<WorkerId, std::map<uint64_t, BlockPlace>> by_age_;
  std::map<BlockPlace, uint32_t> readers_;  // none is 0
  std::map<BlockPlace, uint32_t> writers_;  // none is 0
  std::map<uint64_t, Pin> pins_;
  std::map<WorkerId, uint32_t> pins_of_;
  std::vector<Withdrawal> withdrawals_;
  std::map<WorkerId, uint32_t> withdrawals_of_;
  bool news_ = false;
};

}  // namespace kvferry::engine
