#include "simgpu/core/faults.h"

#include <csignal>
#include <cstdlib>
#include <mutex>
#include <sstream>

#include "simgpu/core/engine.h"
#include "simgpu/core/findings.h"

namespace simgpu {
namespace {

struct sigaction g_before;

void OnFault(int signal, siginfo_t* info, void* context) {
  Engine* engine = Engine::IfMade();
  // What is raised by kill has no address: it is not the engine's.
  if (engine != nullptr && info->si_code > 0) {
    if (engine->host_memory().TakeFault(info->si_addr)) return;
    if (engine->DeviceOf(info->si_addr) >= 0) {
      std::ostringstream text;
      text << "the host touched " << info->si_addr << ", memory of device "
           << engine->DeviceOf(info->si_addr);
      Findings::Get().Add(Fault::kHostOnDevice, "host", text.str());
      PrintPythonStacks();
      std::_Exit(kHostOnDeviceExit);
    }
  }
  if ((g_before.sa_flags & SA_SIGINFO) != 0 && g_before.sa_sigaction != nullptr) {
    g_before.sa_sigaction(signal, info, context);
  } else if (g_before.sa_handler != SIG_DFL && g_before.sa_handler != SIG_IGN) {
    g_before.sa_handler(signal);
  } else {
    std::signal(signal, SIG_DFL);  // the instruction faults again, for good
  }
}

}  // namespace

void CatchFaults() {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  struct sigaction now{};
  sigaction(SIGSEGV, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == &OnFault) return;
  g_before = now;
  struct sigaction action{};
  action.sa_sigaction = &OnFault;
  // On the thread's own stack: the alternate one that Python's faulthandler has set is small.
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
}

}  // namespace simgpu
