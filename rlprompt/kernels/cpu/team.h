// Threads that run one function together and wait for each other between its parts.
//
// A parallel loop of OpenMP wakes its threads and waits for them, which costs more than many a part
// of a decode step; a team wakes them once for all parts.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace rlprompt {

class Team {
 public:
  // Calls work(team) on each of the threads that torch would use. It must not throw, and every
  // thread must come to the same splits.
  template <typename F>
  static void run(const F& work) {
    Meeting meeting;
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Team team(meeting, omp_get_thread_num(), omp_get_num_threads());
      work(team);
    }
  }

  // Calls body(begin, end) with this thread's share of [0, n), and returns when all shares are
  // done.
  template <typename F>
  void split(int64_t n, const F& body) {
    const int64_t share = (n + size_ - 1) / size_;
    const int64_t begin = std::min(n, rank_ * share), end = std::min(n, begin + share);
    if (begin < end) body(begin, end);
    if (size_ > 1) meeting_.wait(size_);
  }

 private:
  class Meeting {
   public:
    void wait(int64_t size) {
      const uint32_t turn = turn_.load(std::memory_order_acquire);
      if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        arrived_.store(0, std::memory_order_relaxed);
        turn_.store(turn + 1, std::memory_order_release);
        turn_.notify_all();
        return;
      }
      // The others are near: sleep only where the machine has something else to do.
      constexpr int kSpins = 4000;
      for (int i = 0; i < kSpins; ++i) {
        if (turn_.load(std::memory_order_acquire) != turn) return;
        relax();
      }
      turn_.wait(turn, std::memory_order_acquire);
    }

   private:
    static void relax() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> turn_{0};
  };

  Team(Meeting& meeting, int64_t rank, int64_t size)
      : meeting_(meeting), rank_(rank), size_(size) {}

  Meeting& meeting_;
  int64_t rank_, size_;
};

// The same parts as parallel loops of their own, between which torch's operations may run.
struct Loops {
  template <typename F>
  void split(int64_t n, const F& body) {
    at::parallel_for(0, n, 1, body);
  }
};

}  // namespace rlprompt
