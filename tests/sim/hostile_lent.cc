// Mapped arenas between the enemy and daemons: what it is lent it writes as long as it has not said
// that it does not; what it lends is not there, or no more, or told of twice. A daemon's gather
// that runs into that ends, whatever becomes of the link, and is never behind what the daemon has
// said.
#include <algorithm>

#include "tests/sim/hostile.h"
#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;
using std::chrono::microseconds;

namespace {

// Chunks that there is room for in what it lends.
constexpr uint64_t kPlaces = uint64_t{1} << 20;

}  // namespace

// What it was lent, and has not given back by its own word, it may write whatever has become of the
// transfer.
void Hostile::write_lent() {
  std::erase_if(lent_, [&](const Lent& of) { return !alive(of.node, of.life); });
  if (lent_.empty()) return;
  const Lent& lent = lent_[rng_.below(lent_.size())];
  Node& node = *world_.nodes[lent.node];
  require(node.engine().lent(lent.region).grant == lent.grant, "lent",
          "a region that the enemy may still write is given to another, or taken back");
  uint8_t* bytes = node.arena(lent.region, 0, lent.region.bytes);
  std::fill(bytes, bytes + lent.region.bytes, uint8_t{0xED});
  ++world_.totals.hostile_writes;
}

// ---- what it lends -----------------------------------------------------------------------------

void Hostile::lend(Link& link) {
  const uint32_t count = rng_.pick(1, 2);
  for (uint32_t arena = 0; arena < count; ++arena) {
    link.lends.insert(arena);
    world_.after(rng_.micros(0, 5000), [this, key = LinkKey{link.node, link.id.value}, arena] {
      const Link& now = links_.at(key);
      if (now.up) post(now, ArenaMapped{now.id, arena});
    });
  }
}

// A region of its own: a new one, one that it has told of before, or one that it does not have.
CreditGrant Hostile::make_place(Link& link) {
  CreditGrant credit{{++next_number_}, link.chunk_bytes, {}};
  uint64_t place = next_place_++;
  if (rng_.chance(50)) place = rng_.below(next_place_);
  if (rng_.chance(30)) place += kPlaces;
  credit.place = RegionPlace{9, place * world_.scenario.chunk_bytes};
  return credit;
}

void Hostile::fill(Link& link, MsgUpdate& update, uint64_t credits) {
  for (uint64_t i = credits; i > 0; --i)
    if (link.mapped_pulls.contains(update.pull))
      update.credits.push_back(make_place(link));
    else
      update.credits.push_back({{++next_number_}, link.chunk_bytes, {}});
}

std::optional<uint64_t> Hostile::begin_gather(uint32_t node, const Gather& command) {
  const LinkKey key{node, command.mapped->link.value};
  Link& link = links_.at(key);
  require(link.lends.contains(command.mapped->arena), "mapped",
          "a gather into an arena that the enemy has not lent");
  Writing writing{key, {}};
  for (const auto& [pull, credit] : link.places)
    if (memory::Region{credit.place->segment, credit.place->offset, credit.bytes} == command.region)
      writing.pulls.insert(pull);
  require(!writing.pulls.empty() && command.bytes <= command.region.bytes, "mapped",
          "a gather into a region that the enemy has not told of");
  const uint64_t gather = next_writing_++;
  writing_[gather] = std::move(writing);
  check_gather(gather, "begins");
  ++world_.totals.hostile_gathers;
  // It may have taken back what it has lent, or go away while it is written.
  if (!whole(link) || gone_ || rng_.chance(30) ||
      command.region.offset >= kPlaces * world_.scenario.chunk_bytes) {
    writing_.erase(gather);
    return std::nullopt;
  }
  const PullId pull = *writing_.at(gather).pulls.begin();
  if (rng_.chance(60)) leave_and_ask(key, pull);
  if (rng_.chance(200))
    world_.after(rng_.micros(1, 500), [this, key, pull] { ask(key.first, pull); });
  return gather;
}

// It ends a pull into which the daemon may be writing, and wants to hear that nothing is written.
void Hostile::ask(uint32_t node, const PullId& pull) {
  if (gone_) return;
  for (auto& [key, link] : links_)
    if (key.first == node && link.boot == pull.receiver && whole(link)) {
      MsgEnd end;
      end.pull = pull;
      end.reason = Reason::kCancelled;
      end.mapped = true;
      return say(link, end);
    }
}

// ... over a later link as that life of it.
void Hostile::leave_and_ask(const LinkKey& key, const PullId& pull) {
  world_.after(rng_.micros(1, 2000), [this, key] {
    if (!gone_) end_link(links_.at(key));
  });
  world_.after(rng_.micros(2000, 4000), [this, key, pull] {
    if (!gone_) establish(key.first, rng_.chance(300), pull.receiver);
  });
  world_.after(rng_.micros(6000, 20000), [this, key, pull] { ask(key.first, pull); });
}

// No byte is written after the daemon has said so. A pull's number that it uses again over a later
// link is another pull.
void Hostile::check_gather(uint64_t gather, const char* when) const {
  const Writing& writing = writing_.at(gather);
  const std::set<PullId>& drained = links_.at(writing.link).drained;
  const bool over = std::all_of(writing.pulls.begin(), writing.pulls.end(),
                                [&](const PullId& pull) { return drained.contains(pull); });
  if (over)
    throw Violation("drained", std::string("a gather into the enemy's arena ") + when +
                                   " after DRAINED was said");
}

void Hostile::end_gather(uint64_t gather) {
  check_gather(gather, "ends");
  writing_.erase(gather);
}

// Said over this link or a later one, it is of all pulls of that number so far.
void Hostile::note_told(Link& link, const MsgDrained& message) {
  ++world_.totals.hostile_drained;
  for (auto& [key, of] : links_)
    if (of.node == link.node && of.life == link.life) of.drained.insert(message.pull);
  for (const auto& [gather, writing] : writing_)
    if (writing.link.first == link.node) check_gather(gather, "runs");
}

}  // namespace kvferry::sim
