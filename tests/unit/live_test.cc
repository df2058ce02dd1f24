// Rates out of two samples, and what of them is shown.
#include "client/ctl/live.h"

#include <catch2/catch.hpp>

#include "client/ctl/screen.h"

using namespace kvferry::ctl;

namespace {

Json transfer(const std::string& handle, uint64_t done, uint64_t total,
              const std::string& state = "ACTIVE") {
  return {{"handle", handle},   {"id_hash", "h" + handle}, {"role", "receive"},
          {"rank", 0},          {"state", state},          {"reason", ""},
          {"bytes_done", done}, {"bytes_total", total},    {"age_seconds", 1.0},
          {"peer", "b"},        {"worker", "decode\n0"}};
}

Sample sample(double seconds, Json transfers, uint64_t counter = 0) {
  Sample out;
  out.seconds = seconds;
  out.status = {{"boot_id", "aa"},       {"version", "1"},        {"node_id", "a"},
                {"uptime_seconds", 5.0}, {"ready", true},         {"healthy", true},
                {"draining", false},     {"reason", ""},          {"links", 1},
                {"workers", 2},          {"sent_bytes", counter}, {"received_bytes", 2 * counter},
                {"local_bytes", 0}};
  out.workers = {{"workers", Json::array()}};
  out.rails = {{"rails",
                {{{"index", 0},
                  {"transport", "tcp"},
                  {"device", "lo"},
                  {"up", true},
                  {"sent_bytes", 3 * counter},
                  {"received_bytes", counter},
                  {"errors", 0},
                  {"restarts", 0},
                  {"settings", {{"UCX_TLS", "tcp"}}}}}}};
  out.arenas = {{"arenas", Json::array()}};
  const std::size_t total = transfers.size();
  out.transfers = {{"transfers", std::move(transfers)}, {"total", total}};
  return out;
}

}  // namespace

TEST_CASE("a transfer's rate is what has come since, its end what is left at that rate") {
  const Sample before = sample(10, {transfer("r1", 100, 1000), transfer("r2", 500, 500)});
  const Sample now = sample(12, {transfer("r1", 400, 1000), transfer("r2", 500, 500, "COMPLETED"),
                                 transfer("r3", 50, 100)});
  const Json watch = watch_json(before, now);
  CHECK(watch["interval_seconds"] == 2);
  const Json& rows = watch["transfers"];
  CHECK(rows[0]["bytes_per_second"] == 150);
  CHECK(rows[0]["eta_seconds"] == 4);
  CHECK(rows[1]["bytes_per_second"] == 0);
  CHECK(rows[1]["eta_seconds"].is_null());
  CHECK(rows[2]["bytes_per_second"].is_null());  // it was not there before
  CHECK(rows[2]["eta_seconds"].is_null());
  const std::string text = watch_text(watch);
  CHECK(text.find("150 B/s") != std::string::npos);
  CHECK(text.find("4.0s") != std::string::npos);
  CHECK(text.find("40%") != std::string::npos);
  CHECK(text.find("decode?0") != std::string::npos);  // no line break from a worker's name
}

TEST_CASE("bytes that were taken back make no rate, and neither does another transfer's handle") {
  const Sample before = sample(0, {transfer("r1", 400, 1000), transfer("r2", 0, 1000)});
  Sample now = sample(1, {transfer("r1", 100, 1000), transfer("r2", 10, 1000)});
  now.transfers["transfers"][1]["id_hash"] = "other";
  const Json watch = watch_json(before, now);
  CHECK(watch["transfers"][0]["bytes_per_second"].is_null());
  CHECK(watch["transfers"][1]["bytes_per_second"].is_null());
}

TEST_CASE("top has the busiest transfers first and counts all by state") {
  const Sample before = sample(0, {transfer("r1", 0, 9000), transfer("r2", 0, 9000),
                                   transfer("r3", 0, 9000), transfer("r4", 0, 0, "OPEN")});
  const Sample now = sample(1,
                            {transfer("r1", 0, 9000), transfer("r2", 10, 9000),
                             transfer("r3", 20, 9000), transfer("r4", 0, 0, "OPEN")},
                            64);
  const Json top = top_json(before, now, 3);
  REQUIRE(top["transfers"].size() == 3);
  CHECK(top["transfers"][0]["handle"] == "r3");
  CHECK(top["transfers"][1]["handle"] == "r2");
  CHECK(top["transfers"][2]["handle"] == "r1");  // it stands still, with more to come than r4
  CHECK(top["transfers_by_state"]["receive"]["ACTIVE"] == 3);
  CHECK(top["transfers_by_state"]["receive"]["OPEN"] == 1);
  CHECK(top["rates"]["sent_bytes_per_second"] == 64);
  CHECK(top["rates"]["received_bytes_per_second"] == 128);
  CHECK(top["rails"][0]["sent_bytes_per_second"] == 192);
  const std::string text = top_text(top);
  CHECK(text.find("out 64 B/s   in 128 B/s") != std::string::npos);
  CHECK(text.find("receive: 3 ACTIVE 1 OPEN") != std::string::npos);
  CHECK(text.find("(the busiest 3 of 4)") != std::string::npos);
}

TEST_CASE("a daemon that has been started anew has no rates yet") {
  const Sample before = sample(0, Json::array(), 1000);
  Sample now = sample(1, Json::array(), 2000);
  now.status["boot_id"] = "bb";
  const Json top = top_json(before, now, 3);
  CHECK(top["rates"]["sent_bytes_per_second"].is_null());
  CHECK(top["rails"][0]["sent_bytes_per_second"].is_null());
  CHECK(top_text(top).find("out -   in -") != std::string::npos);
  CHECK(top_text(top).find("transfers  none") != std::string::npos);
}

TEST_CASE("what does not fit the terminal is cut, between characters") {
  CHECK(cut("abc\ndef\nghi\n", 2, 2) == "ab\nde\n");
  CHECK(cut("a\xc3\xa4"
            "b\n",
            1, 2) == "a\xc3\xa4\n");
  CHECK(cut("", 3, 3).empty());
  CHECK(cut("abc", 3, 0).empty());
}
