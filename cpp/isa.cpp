#include "isa.h"

#include <atomic>
#include <cstdlib>

#if defined(KVLOOM_X86)
namespace isa_avx512bf16 { extern const kvloom::Kernels table; }
namespace isa_avx512 { extern const kvloom::Kernels table; }
namespace isa_avx2 { extern const kvloom::Kernels table; }
#endif
namespace isa_portable { extern const kvloom::Kernels table; }

namespace kvloom {

namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(KVLOOM_X86)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&isa_avx512bf16::table);
  if (avx512) found.push_back(&isa_avx512::table);
  if (avx2) found.push_back(&isa_avx2::table);
#endif
  found.push_back(&isa_portable::table);
  return found;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* table : runnable())
    if (name == table->name) return table;
  return nullptr;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> table{[] {
    const char* wanted = std::getenv("KVLOOM_CPU_ISA");
    const Kernels* chosen = wanted ? find(wanted) : nullptr;
    return chosen ? chosen : runnable().front();
  }()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : runnable()) names.push_back(table->name);
  return names;
}

bool force_isa(const std::string& name) {
  const Kernels* table = find(name);
  if (!table) return false;
  active().store(table);
  return true;
}

}  // namespace kvloom
