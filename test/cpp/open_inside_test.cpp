// What the system opens beneath a directory, with openat2 and where there is none: a filter of
// system calls takes it away, as containers' do, in a process of its own.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>

#include "io/file_system.h"

namespace hsdp_ckpt {
namespace {

constexpr long kOpenat2 = 437;

// False where the system has no such filters.
bool Refuse(long call, int error) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<uint32_t>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{std::size(program), program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

class OpenInsideTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string made = (std::filesystem::temp_directory_path() / "inside-XXXXXX").string();
    ASSERT_NE(::mkdtemp(made.data()), nullptr);
    top_ = made;
    root_ = top_ / "root";
    std::filesystem::create_directories(root_ / "folder");
    std::ofstream(root_ / "file") << "x";
    std::ofstream(root_ / "folder" / "file") << "x";
    std::ofstream(top_ / "outside") << "x";
    std::filesystem::create_symlink("file", root_ / "link");
    std::filesystem::create_symlink("folder", root_ / "linked_folder");
    std::filesystem::create_symlink("../outside", root_ / "link_out");
    std::filesystem::create_symlink(top_ / "outside", root_ / "absolute_link");
    std::filesystem::create_symlink("..", root_ / "folder_out");
    ASSERT_EQ(::mkfifo((root_ / "pipe").c_str(), 0600), 0);
  }
  void TearDown() override { std::filesystem::remove_all(top_); }

  int Open(const std::string& name) {
    std::unique_ptr<io::RawFile> file;
    return io::PosixFileSystem().OpenInside(root_.string(), name, io::OpenMode::kRead, &file);
  }
  // Says in words what is not as it should be; `inner_links`: those that lead nowhere else.
  std::string Differences(int inner_links) {
    const std::pair<const char*, int> expected[] = {
        {"file", 0},
        {"folder/file", 0},
        {"link", inner_links},
        {"linked_folder/file", inner_links},
        {"link_out", -ELOOP},
        {"absolute_link", -ELOOP},
        {"folder_out/outside", -ELOOP},
        {"../outside", -ELOOP},
        {"folder/../../outside", -ELOOP},
        {"pipe", -EOPNOTSUPP},
        {"folder", -EOPNOTSUPP},
        {"missing", -ENOENT},
        {"missing/file", -ENOENT},
    };
    std::string found;
    for (const auto& [name, rc] : expected) {
      if (const int is = Open(name); is != rc) {
        found += std::string(name) + ": " + std::to_string(is) + "\n";
      }
    }
    return found;
  }
  std::filesystem::path top_, root_;
};

TEST_F(OpenInsideTest, LinksThatStayInsideAreFollowed) {
  if (::syscall(kOpenat2, -1, nullptr, nullptr, 0) < 0 && (errno == ENOSYS || errno == EPERM)) {
    GTEST_SKIP() << "this system has no openat2";
  }
  EXPECT_EQ(Differences(0), "");
}

TEST_F(OpenInsideTest, WithoutOpenat2NoLinkIsFollowed) {
  for (const int error : {ENOSYS, EPERM}) {
    const auto look = [&] {
      if (!Refuse(kOpenat2, error)) {
        std::cerr << "no filter\n";
        std::_Exit(2);
      }
      const std::string differences = Differences(-ELOOP);
      std::cerr << differences << "looked\n";
      std::_Exit(differences.empty() ? 0 : 1);
    };
    EXPECT_EXIT(look(), ::testing::ExitedWithCode(0), "^looked");
  }
}

}  // namespace
}  // namespace hsdp_ckpt
