// Any topology to any other: every pair is a row, moved whole, with each destination byte checked
// and each byte outside it checked untouched.
#include <catch2/catch.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/unit/acceptance_support.h"

using namespace kvferry;
using namespace kvferry::acceptance;

namespace {

using Pair = std::pair<std::string, std::string>;

// Moves `groups` (both sides alike) along each pair, at two prompts: one on a block's edge.
void run_pairs(const std::vector<ModelGroup>& groups, const std::vector<Pair>& pairs) {
  for (const auto& [from, to] : pairs) {
    for (const uint64_t prompt : {uint64_t{32}, uint64_t{45}}) {
      const Case of = between(from, to, groups, prompt);
      Outcome outcome;
      INFO(of.name);
      REQUIRE_NOTHROW(outcome = run_case(of));
      CHECK(outcome.bytes > 0);
      CHECK(outcome.cells > 0);
    }
  }
}

std::vector<Pair> with_themselves(const std::vector<std::string>& names) {
  std::vector<Pair> pairs;
  for (const std::string& name : names) pairs.emplace_back(name, name);
  return pairs;
}

}  // namespace

TEST_CASE("symmetric topologies") {
  run_pairs(attention(8, 8), with_themselves({"1", "tp2", "pp2", "tp2pp2", "tp4", "pp4", "tp4pp2",
                                              "tp2pp4", "tp4pp4"}));
}

TEST_CASE("asymmetric topologies") {
  run_pairs(attention(8, 8), {{"1", "pp2"},
                              {"pp2", "1"},
                              {"pp2", "tp2"},
                              {"tp2", "pp2"},
                              {"tp4", "tp2pp2"},
                              {"tp4", "pp4"},
                              {"tp2pp2", "tp4"},
                              {"pp4", "tp4"},
                              {"pp4", "tp2pp2"},
                              {"tp4pp2", "tp2pp4"}});
}

TEST_CASE("attention data parallelism, from whichever group ran the prefill") {
  run_pairs(attention(8, 8), {{"tp2D", "tp2D"},
                              {"tp4D", "tp4D"},
                              {"tp2D", "pp2"},
                              {"tp4D", "tp2pp2"},
                              {"pp4", "tp2pp2 D"},
                              {"tp2pp2 D", "tp2pp2 D"},
                              {"tp4pp2 D", "tp4pp2 D"},
                              {"tp2", "tp2D"},
                              {"tp2D", "tp2"}});
}

TEST_CASE("latent attention") {
  run_pairs(latent(8), {{"1", "1"},
                        {"tp2", "tp2"},
                        {"tp4", "tp4"},
                        {"tp2pp2", "tp2pp2"},
                        {"tp4pp2", "tp4pp2"},
                        {"tp2", "tp2D"},
                        {"tp2D", "tp2"},
                        {"tp4D", "tp4D"},
                        {"tp2", "pp2"},
                        {"tp4D", "tp8"},
                        {"tp4", "tp8"},
                        {"tp8", "tp4"},
                        {"tp4", "tp4D"}});
}

TEST_CASE("fewer heads than ranks") {
  run_pairs(attention(4, 2), {{"tp4", "tp2"}, {"tp2", "tp4"}});
  run_pairs(attention(4, 4), {{"tp8", "1"}, {"1", "tp8"}, {"tp2", "tp8"}, {"tp8", "tp2"}});
  run_pairs(attention(4, 8), {{"tp16", "tp4"}});
}

TEST_CASE("degrees that do not divide each other") {
  run_pairs(attention(3, 24), {{"tp6", "tp4"}, {"tp4", "tp6"}});
  run_pairs(attention(3, 12), {{"tp3", "tp2"}});
  run_pairs(attention(3, 6), {{"tp2", "tp3"}});
}

TEST_CASE("uneven pipelines") {
  for (const uint32_t layers : {5U, 7U}) {
    run_pairs(attention(layers, 4), {{"pp2", "pp2"},
                                     {"pp3", "pp3"},
                                     {"pp4", "pp4"},
                                     {"tp2", "pp2"},
                                     {"pp2", "tp2"},
                                     {"tp4", "pp4"},
                                     {"pp4", "tp4"},
                                     {"tp2pp2", "pp4"},
                                     {"pp2", "pp3"},
                                     {"pp4", "pp3"}});
    run_pairs(latent(layers), {{"pp2", "pp3"}, {"tp2pp2", "pp4"}, {"pp4", "tp2"}});
  }
}

TEST_CASE("layers that only one side has") {
  const std::vector<ModelGroup> plain = attention(6, 4);
  std::vector<ModelGroup> extra = attention(7, 4);
  // The receiver's draft layer is optional; the sender's is of no interest.
  extra.front().parts.front().layers = every(6, 1, 0);
  Part draft = extra.front().parts.front();
  draft.layers = {6};
  draft.optional = true;
  extra.front().parts.push_back(draft);
  for (const auto& [from, to] :
       std::vector<Pair>{{"1", "1"}, {"tp2", "pp2"}, {"pp2", "tp4"}, {"tp2pp2", "tp4"}}) {
    for (const bool receiver_has : {false, true}) {
      Case of = between(from, to, plain);
      (receiver_has ? of.receiver : of.sender).groups = extra;
      of.name += receiver_has ? ", receiver's draft layer" : ", sender's";
      INFO(of.name);
      REQUIRE_NOTHROW(run_case(of));
    }
  }
}

TEST_CASE("a receiver rank that has nothing but optional planes") {
  std::vector<ModelGroup> groups = attention(4, 2);
  Part draft = groups.front().parts.front();
  groups.front().layers = every(8, 1, 0);
  groups.front().parts.front().layers = every(4, 1, 0);
  draft.layers = {4, 5, 6, 7};
  draft.optional = true;
  groups.front().parts.push_back(draft);
  Case of = between("tp2", "pp2", attention(4, 2), 40);
  of.receiver.groups = groups;
  Outcome outcome;
  REQUIRE_NOTHROW(outcome = run_case(of));
  CHECK(outcome.empty_legs == 1);
}

TEST_CASE("wide instances") {
  run_pairs(attention(4, 8), {{"tp8pp2", "tp8pp2"}});
  run_pairs(latent(4), {{"tp8D", "tp16"}});
  run_pairs(attention(4, 4), {{"tp4", "tp16D"}});
}

TEST_CASE("context-parallel ranks, dealt in whole blocks and token by token") {
  for (const uint64_t interleave : {uint64_t{0}, uint64_t{1}, uint64_t{4}}) {
    for (const auto& groups : {attention(4, 4), latent(4)}) {
      for (const auto& [from, to] : std::vector<Pair>{{"1", "cp2"},
                                                      {"tp2", "cp4"},
                                                      {"cp2", "tp2"},
                                                      {"cp4", "1"},
                                                      {"cp2", "cp2"},
                                                      {"tp2cp2", "tp4cp2"},
                                                      {"tp4", "tp2cp2"},
                                                      {"tp4", "cp4"},
                                                      {"pp2cp2", "tp2"}}) {
        for (const uint64_t prompt : {uint64_t{7}, uint64_t{64}, uint64_t{83}}) {
          Case of = between(from, to, groups, prompt);
          for (SideSpec* side : {&of.sender, &of.receiver})
            if (side->topology.cp > 1) side->topology.interleave = interleave;
          of.name += ", interleave " + std::to_string(interleave);
          INFO(of.name);
          REQUIRE_NOTHROW(run_case(of));
        }
      }
    }
  }
}
