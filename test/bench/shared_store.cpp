// A store of fixed bandwidth that all processes share, for shared_store.py: LD_PRELOADed, it lets
// every read of a file below STORE_DIRECTORY return only when the store, which serves one request
// after the other at STORE_BYTES_PER_SECOND, would have sent its bytes. It does not know who reads:
// torch's reader and ours are slowed down by the same code.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace {

/// When the store will have served all that has been asked so far, in ns of the monotonic clock; in
/// memory of STORE_CLOCK.
struct Store {
  const char* directory = std::getenv("STORE_DIRECTORY");
  double bytes_per_second = std::atof(std::getenv("STORE_BYTES_PER_SECOND"));
  std::atomic<int64_t>* free_at = [] {
    const int fd = ::open(std::getenv("STORE_CLOCK"), O_RDWR | O_CLOEXEC);
    void* memory =
        ::mmap(nullptr, sizeof(std::atomic<int64_t>), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) std::abort();
    ::close(fd);
    return static_cast<std::atomic<int64_t>*>(memory);
  }();

  bool Has(int fd) const {
    char link[64], path[4096];
    std::snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t length = ::readlink(link, path, sizeof(path));
    const auto prefix = static_cast<ssize_t>(std::strlen(directory));
    return length > prefix && std::memcmp(path, directory, static_cast<size_t>(prefix)) == 0;
  }

  void Serve(int fd, ssize_t bytes) const {
    if (bytes <= 0 || !Has(fd)) return;
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    const int64_t asked = now.tv_sec * 1'000'000'000 + now.tv_nsec;
    const auto takes = static_cast<int64_t>(1e9 * static_cast<double>(bytes) / bytes_per_second);
    int64_t free = *free_at, done = 0;
    do {
      done = (free > asked ? free : asked) + takes;
    } while (!free_at->compare_exchange_weak(free, done));
    const timespec end{done / 1'000'000'000, done % 1'000'000'000};
    while (::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, nullptr) != 0) {
    }
  }
};

template <typename Call, typename... Arguments>
ssize_t Served(const char* name, int fd, Arguments... arguments) {
  static const auto call = reinterpret_cast<Call>(::dlsym(RTLD_NEXT, name));
  static const Store store;
  const ssize_t bytes = call(fd, arguments...);
  store.Serve(fd, bytes);
  return bytes;
}

}  // namespace

// The dynamic linker takes these for libc's, in the interpreter and in every library.
#pragma GCC visibility push(default)
extern "C" {
ssize_t read(int fd, void* data, size_t size) {
  return Served<ssize_t (*)(int, void*, size_t)>("read", fd, data, size);
}
ssize_t pread(int fd, void* data, size_t size, off_t at) {
  return Served<ssize_t (*)(int, void*, size_t, off_t)>("pread", fd, data, size, at);
}
ssize_t pread64(int fd, void* data, size_t size, off64_t at) {
  return Served<ssize_t (*)(int, void*, size_t, off64_t)>("pread64", fd, data, size, at);
}
}
#pragma GCC visibility pop
