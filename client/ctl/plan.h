// `kvferryctl plan`: what a transfer between two instances would move, worked out from files alone
// by the code that the daemons run. Needs no daemon.
#pragma once

#include <iosfwd>
#include <string>

namespace kvferry::ctl {

struct PlanOptions {
  std::string sender_file;    // a kvferry.v1.PlanInstance as JSON; "-": standard input
  std::string receiver_file;  // the same
  bool json = false;
  bool fragments = false;
  bool text = false;
};

// Works out every leg, then prints them one at a time, so that memory does not grow with the number
// of fragments and nothing is printed before the last thing that can be wrong was looked at.
// Returns the exit code: 0; 1 if the sender does not offer all that the receiver needs; 65 with a
// message naming file and field if a file is wrong or the instances do not fit.
int plan_transfer(const PlanOptions& options, std::ostream& out, std::ostream& errors);

}  // namespace kvferry::ctl
