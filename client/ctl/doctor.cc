#include "client/ctl/doctor.h"

#include <algorithm>
#include <iterator>

namespace kvferry::ctl {
namespace {

void append(Findings& to, Findings more) {
  std::move(more.begin(), more.end(), std::back_inserter(to));
}

const char* word(Grade grade) {
  switch (grade) {
    case Grade::kOk:
      return "OK";
    case Grade::kNote:
      return "note";
    case Grade::kProblem:
      break;
  }
  return "PROBLEM";
}

std::size_t count(const Findings& findings, Grade grade) {
  return static_cast<std::size_t>(
      std::count_if(findings.begin(), findings.end(),
                    [&](const Finding& finding) { return finding.grade == grade; }));
}

}  // namespace

Findings run_doctor(const System& system, const DoctorOptions& options,
                    const std::optional<DaemonFacts>& daemon, const RunChild& run_child,
                    const AskRails& ask_rails) {
  GpuFindings gpus = check_gpus(system, options, run_child);
  Findings out = check_sockets(system, options);
  append(out, check_daemon(daemon, options));
  append(out, std::move(gpus.findings));
  append(out, check_namespaces(system, options, gpus.usable));
  append(out, check_ucx(daemon, ask_rails, gpus.usable));
  append(out, check_limits(system, options, gpus.usable));
  return out;
}

nlohmann::ordered_json doctor_json(const Findings& findings) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Finding& finding : findings)
    list.push_back({{"check", finding.check},
                    {"grade", finding.grade == Grade::kOk     ? "ok"
                              : finding.grade == Grade::kNote ? "note"
                                                              : "problem"},
                    {"text", finding.text},
                    {"advice", finding.advice}});
  return {{"problems", count(findings, Grade::kProblem)},
          {"notes", count(findings, Grade::kNote)},
          {"findings", std::move(list)}};
}

std::string doctor_text(const Findings& findings) {
  std::string out;
  for (const Finding& finding : findings) {
    std::string line = word(finding.grade);
    line.resize(9, ' ');
    out += line + finding.check + ": " + finding.text + "\n";
    if (!finding.advice.empty()) out += std::string(9, ' ') + "-> " + finding.advice + "\n";
  }
  const std::size_t problems = count(findings, Grade::kProblem);
  out += problems == 0 ? std::string("no problems\n") : std::to_string(problems) + " problem(s)\n";
  return out;
}

int doctor_exit(const Findings& findings) {
  return count(findings, Grade::kProblem) == 0 ? 0 : 1;
}

}  // namespace kvferry::ctl
