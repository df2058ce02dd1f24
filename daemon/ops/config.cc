#include "daemon/ops/config.h"

#include <sys/stat.h>
#include <toml++/toml.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <sstream>
#include <utility>

#include "daemon/ops/config_files.h"
#include "daemon/ops/config_values.h"

namespace kvferry::ops {
namespace {

using Form = RawValue::Form;

constexpr int64_t kConfigVersion = 1;
constexpr std::size_t kMaxRepeats = 4096;  // [[socket]] and [[peers]] entries

std::string number_text(double value) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out << value;
  return out.str();
}

RawValue raw_of(const toml::node& node) {
  if (const auto* text = node.as_string()) return {Form::kString, text->get(), {}};
  if (const auto* number = node.as_integer())
    return {Form::kInteger, std::to_string(number->get()), {}};
  if (const auto* number = node.as_floating_point())
    return {Form::kFloat, number_text(number->get()), {}};
  if (const auto* flag = node.as_boolean())
    return {Form::kBoolean, flag->get() ? "true" : "false", {}};
  if (const auto* array = node.as_array()) {
    RawValue out{Form::kList, {}, {}};
    for (const toml::node& element : *array) {
      const RawValue word = raw_of(element);
      if (word.form != Form::kString && word.form != Form::kInteger) return {};
      out.list.push_back(word.text);
    }
    return out;
  }
  return {};
}

// Reads the files' tables into a Config, one file after the other. Nothing stays bound to elements
// of the Config's own vectors, which grow.
class FileReader {
 public:
  explicit FileReader(LoadedConfig& loaded) : loaded_(loaded), places_(loaded.places) {}

  void read(const ConfigFile& file) {
    file_ = file.path;
    try {
      const toml::table root = toml::parse(file.text, file_);
      read_version(root, file.main);
      read_sections(root);
    } catch (const toml::parse_error& error) {
      loaded_.problems.push_back({file_ + ":" + std::to_string(error.source().begin.line), "",
                                  "not TOML: " + std::string(error.description())});
    }
  }

 private:
  // [[socket]] or [[peers]].
  template <typename T>
  struct Repeated {
    std::vector<T>& entries;
    std::string T::*identity;  // no two have the same
    std::string_view identity_key;
    Section (*schema)(T&);
    bool given = false;  // by any file; until then the built-in ones stand there
  };

  void read_sections(const toml::table& root) {
    const std::vector<Section> schema = config_schema(loaded_.config);
    for (const auto& [key, node] : root) {
      const std::string name(key.str());
      if (name == "config_version") continue;
      if (name == "socket") {
        read_repeated(node, name, sockets_);
      } else if (name == "peers") {
        read_repeated(node, name, peers_);
      } else if (name == "ucx") {
        read_ucx(node);
      } else {
        const auto section = std::find_if(schema.begin(), schema.end(),
                                          [&](const Section& s) { return s.name == name; });
        if (section == schema.end()) {
          problem(node, name, "unknown section or key");
        } else if (const auto* table = node.as_table()) {
          read_table(*table, name, *section, "");
        } else {
          problem(node, name, "must be a table: [" + name + "]");
        }
      }
    }
  }

  std::string where(const toml::node& node) const {
    return file_ + ":" + std::to_string(node.source().begin.line);
  }
  void problem(const toml::node& node, std::string key, std::string message) {
    loaded_.problems.push_back({where(node), std::move(key), std::move(message)});
  }

  void read_version(const toml::table& root, bool needed) {
    const toml::node* version = root.get("config_version");
    if (version == nullptr) {
      if (!needed) return;
      loaded_.problems.push_back({file_ + ":1", "config_version", "is missing; write 1"});
    } else if (version->value<int64_t>() != kConfigVersion) {
      problem(*version, "config_version", "must be 1, the version that this release reads");
    }
  }

  // `inner` is the dotted path within the section, empty at its top.
  void read_table(const toml::table& table, const std::string& section_path, const Section& section,
                  const std::string& inner) {
    for (const auto& [key, node] : table) {
      std::string name = inner;
      if (!name.empty()) name += '.';
      name += key.str();
      const std::string path = section_path + "." + name;
      const auto known = std::find_if(section.keys.begin(), section.keys.end(),
                                      [&](const Key& k) { return k.name == name; });
      if (known != section.keys.end()) {
        places_[path] = {Place::Kind::kFile, where(node)};
        const std::string wrong = known->binding.assign(raw_of(node));
        if (!wrong.empty()) problem(node, path, wrong);
        continue;
      }
      const bool is_prefix =
          std::any_of(section.keys.begin(), section.keys.end(),
                      [&](const Key& k) { return k.name.rfind(name + ".", 0) == 0; });
      if (is_prefix && node.is_table()) {
        read_table(*node.as_table(), section_path, section, name);
      } else {
        problem(node, path, is_prefix ? "must be a table" : "unknown key");
      }
    }
  }

  template <typename T>
  void read_repeated(const toml::node& node, const std::string& name, Repeated<T>& all) {
    const toml::array* array = node.as_array();
    if (array == nullptr || (!array->empty() && !array->is_array_of_tables())) {
      problem(node, name, "must be given as [[" + name + "]]");
      return;
    }
    if (!std::exchange(all.given, true) || array->empty()) {
      all.entries.clear();
      forget(name + "[");
    }
    const std::size_t earlier = all.entries.size();  // of files before
    if (earlier + array->size() > kMaxRepeats) {
      problem(node, name, "stands more than " + std::to_string(kMaxRepeats) + " times");
      return;
    }
    std::set<std::size_t> replaced;
    for (std::size_t i = 0; i < array->size(); ++i) {
      const toml::table& table = *array->get(i)->as_table();
      const auto at = static_cast<std::size_t>(
          std::find_if(all.entries.begin(),
                       all.entries.begin() + static_cast<std::ptrdiff_t>(earlier),
                       [&](const T& entry) { return is_same(table, entry, all); }) -
          all.entries.begin());
      // What stands twice in one file is a mistake, and told as one.
      const bool replaces = at < earlier && replaced.insert(at).second;
      const std::size_t index = replaces ? at : all.entries.size();
      if (!replaces) all.entries.emplace_back();
      all.entries[index] = T{};
      const std::string path = name + "[" + std::to_string(index) + "]";
      forget(path);
      places_[path] = {Place::Kind::kFile, where(table)};
      read_table(table, path, all.schema(all.entries[index]), "");
    }
  }

  template <typename T>
  static bool is_same(const toml::table& table, const T& entry, const Repeated<T>& all) {
    const std::string identity = table[all.identity_key].value_or(T{}.*all.identity);
    return !identity.empty() && entry.*all.identity == identity;
  }

  void forget(const std::string& prefix) {
    std::erase_if(places_, [&](const auto& entry) { return entry.first.starts_with(prefix); });
  }

  void read_ucx(const toml::node& node) {
    const toml::table* table = node.as_table();
    if (table == nullptr) {
      problem(node, "ucx", "must be a table: [ucx]");
      return;
    }
    for (const auto& [key, value] : *table) {
      const std::string name(key.str());
      const RawValue raw = raw_of(value);
      const bool word =
          raw.form == Form::kString || raw.form == Form::kInteger || raw.form == Form::kFloat;
      const std::string wrong = word ? refuse_ucx(name, raw.text) : "must be a string or a number";
      if (!wrong.empty()) {
        problem(value, "ucx." + name, wrong);
        continue;
      }
      places_["ucx." + name] = {Place::Kind::kFile, where(value)};
      loaded_.config.ucx[name] = raw.text;
    }
  }

  LoadedConfig& loaded_;
  Places& places_;
  std::string file_;
  Repeated<SocketConfig> sockets_{loaded_.config.sockets, &SocketConfig::path, "path",
                                  socket_schema};
  Repeated<PeerConfig> peers_{loaded_.config.peers, &PeerConfig::identity, "identity", peer_schema};
};

// A key from outside the files: "section" and "key" as in them.
void assign_free(LoadedConfig& loaded, const std::vector<Section>& schema, const Place& place,
                 const std::string& section, const std::string& key, const std::string& text) {
  const std::string path = section + "." + key;
  const auto refuse = [&](std::string message) {
    loaded.problems.push_back({place.text, path, std::move(message)});
  };
  if (section == "socket" || section == "peers") {
    refuse("can be given in the file only");
    return;
  }
  if (section == "ucx") {
    const std::string wrong = refuse_ucx(key, text);
    if (!wrong.empty()) return refuse(wrong);
    loaded.places[path] = place;
    loaded.config.ucx[key] = text;
    return;
  }
  for (const Section& known : schema) {
    if (known.name != section) continue;
    for (const Key& candidate : known.keys) {
      if (candidate.name != key) continue;
      loaded.places[path] = place;
      const std::string wrong = candidate.binding.assign({Form::kFree, text, {}});
      if (!wrong.empty()) refuse(wrong);
      return;
    }
  }
  refuse("unknown key");
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

void load_environment(LoadedConfig& loaded, const std::vector<Section>& schema,
                      const ConfigSources& sources) {
  static constexpr std::string_view kPrefix = "KVFERRY_";
  std::set<std::string> sections{"socket", "peers", "ucx"};
  for (const Section& section : schema) sections.insert(section.name);
  for (const auto& [variable, value] : sources.environment) {
    if (variable.rfind(kPrefix, 0) != 0) continue;
    const std::string rest = variable.substr(kPrefix.size());
    const std::size_t bar = rest.find('_');
    if (bar == std::string::npos) continue;  // no section: somebody else's, as the client's
    const std::string section = lower(rest.substr(0, bar));
    if (sections.count(section) == 0) continue;
    const std::string key = rest.substr(bar + 1);
    assign_free(loaded, schema, {Place::Kind::kEnvironment, "environment " + variable}, section,
                section == "ucx" ? key : lower(key), value);
  }
}

void load_sets(LoadedConfig& loaded, const std::vector<Section>& schema,
               const ConfigSources& sources) {
  for (const std::string& set : sources.sets) {
    const std::size_t equals = set.find('=');
    const std::size_t dot = set.find('.');
    if (equals == std::string::npos || dot == std::string::npos || dot > equals) {
      loaded.problems.push_back({"--set", set, "is not section.key=value"});
      continue;
    }
    assign_free(loaded, schema, {Place::Kind::kCommandLine, "--set"}, set.substr(0, dot),
                set.substr(dot + 1, equals - dot - 1), set.substr(equals + 1));
  }
}

// Problems of files in order of the files and their lines; other places keep their order behind.
void sort_problems(std::vector<ConfigProblem>& problems, const std::vector<ConfigFile>& files) {
  using Rank = std::pair<std::size_t, uint64_t>;
  const auto rank_of = [&](const ConfigProblem& problem) -> Rank {
    const std::size_t colon = problem.where.rfind(':');
    for (std::size_t i = 0; i < files.size(); ++i) {
      if (problem.where == files[i].path) return {i, 0};
      if (colon != std::string::npos && problem.where.substr(0, colon) == files[i].path)
        return {i, std::strtoull(problem.where.c_str() + colon + 1, nullptr, 10)};
    }
    return {files.size(), 0};
  };
  std::stable_sort(problems.begin(), problems.end(),
                   [&](const auto& a, const auto& b) { return rank_of(a) < rank_of(b); });
}

}  // namespace

std::string ConfigProblem::to_string() const {
  std::string out = where;
  if (!key.empty()) out.append(out.empty() ? "" : ": ").append(key);
  return out.append(": ").append(message);
}

LoadedConfig load_config(const ConfigSources& sources) {
  LoadedConfig loaded;
  std::vector<ConfigFile> files;
  if (!sources.file.empty()) files = read_config_files(sources.file, loaded.problems);
  {
    FileReader reader(loaded);
    for (const ConfigFile& file : files) reader.read(file);
    const std::vector<Section> schema = config_schema(loaded.config);
    load_environment(loaded, schema, sources);
    load_sets(loaded, schema, sources);
  }
  check_config(loaded, sources.file);
  sort_problems(loaded.problems, files);
  sort_problems(loaded.warnings, files);
  return loaded;
}

std::vector<std::pair<std::string, std::string>> current_environment() {
  std::vector<std::pair<std::string, std::string>> out;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const std::size_t equals = text.find('=');
    if (equals == std::string_view::npos) continue;
    out.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  }
  return out;
}

std::string derived_grpc_path(std::string_view lifeline_path) {
  return std::string(lifeline_path) + ".grpc";
}

Result<std::string> read_secret_file(const std::string& path) {
  const auto refuse = [&](std::string message) {
    return fail(Code::kFailedPrecondition, "SECRET_FILE", path + ": " + std::move(message));
  };
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return refuse(std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return refuse("is not a regular file");
  if ((info.st_mode & 077U) != 0)
    return refuse("may be read or written by others than its owner; chmod it to 0600");
  auto text = read_whole_file(path, 4 * kKiB);
  if (!text) return refuse(text.error().message);
  const std::string_view blanks = " \t\r\n";
  const std::size_t begin = text->find_first_not_of(blanks);
  const std::size_t end = text->find_last_not_of(blanks);
  const std::size_t size = begin == std::string::npos ? 0 : end + 1 - begin;
  if (size < 16) return refuse("holds less than 16 bytes");
  return text->substr(begin, size);
}

}  // namespace kvferry::ops
