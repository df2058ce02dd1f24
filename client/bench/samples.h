// Figures of one kind, and what is told of them.
#pragma once

#include <cstddef>
#include <vector>

namespace kvferry::bench {

class Samples {
 public:
  void add(double value) { values_.push_back(value); }
  std::size_t count() const { return values_.size(); }
  // The smallest of the values that at least `share` (0 to 1) of them do not exceed; 0 without any.
  double percentile(double share) const;
  double median() const { return percentile(0.5); }
  double mean() const;
  double max() const { return percentile(1); }
  const std::vector<double>& values() const { return values_; }

 private:
  std::vector<double> values_;
};

// Jain's index of what several got: 1 if all got the same, 1/n if one got everything.
double fairness(const std::vector<double>& shares);

}  // namespace kvferry::bench
