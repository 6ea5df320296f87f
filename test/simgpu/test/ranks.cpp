#include "simgpu/test/ranks.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>

#include "simgpu/core/findings.h"

namespace simgpu {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void Child(int rank, const fs::path& directory,
                        const std::map<std::string, std::string>& environment,
                        const std::function<void(int rank)>& program) {
  const std::string output = (directory / ("output" + std::to_string(rank))).string();
  if (std::freopen(output.c_str(), "w", stderr) == nullptr) std::_Exit(99);
  std::setvbuf(stderr, nullptr, _IONBF, 0);
  setenv("SIMGPU_DIR", directory.c_str(), 1);
  for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
  int status = 0;
  try {
    program(rank);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "raised: %s\n", error.what());
    status = 1;
  }
  std::ofstream(directory / ("findings" + std::to_string(rank))) << Findings::Get().count();
  std::_Exit(status);
}

std::string Contents(const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace

std::vector<Ended> RunRanks(int size, const std::map<std::string, std::string>& environment,
                            const std::function<void(int rank)>& program) {
  std::string name = (fs::temp_directory_path() / "simgpu_test_XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp " + name);
  std::vector<pid_t> processes;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t process = fork();
    if (process == 0) Child(rank, name, environment, program);
    processes.push_back(process);
  }
  std::vector<Ended> all;
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    waitpid(processes[static_cast<size_t>(rank)], &status, 0);
    Ended ended;
    ended.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    ended.text = Contents(fs::path(name) / ("output" + std::to_string(rank)));
    std::istringstream(Contents(fs::path(name) / ("findings" + std::to_string(rank)))) >>
        ended.findings;
    all.push_back(ended);
  }
  fs::remove_all(name);
  return all;
}

}  // namespace simgpu
