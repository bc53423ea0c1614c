// Running numbered tasks on several threads: torch's own OpenMP team where there is one, else a small
// pool.
//
// A team of ours beside torch's would fight it for the cores: OpenMP's threads go on spinning for a
// while after torch's operators. The pool is for processes without OpenMP, and for forked children, in
// which OpenMP hangs and which have none of their parent's threads.
#pragma once
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace fastpref::cpu {
namespace {  // for cpu.cpp alone: nothing here is exported

struct Job {
  std::function<void(int64_t)> const& task;
  int64_t count, batch;
  std::atomic<int64_t> next{0};

  // Neighbouring tasks stay on one thread, a batch at a time: memory is read in longer stretches.
  void work() {
    for (int64_t i; (i = next.fetch_add(batch, std::memory_order_relaxed)) < count;)
      for (int64_t const end = std::min(i + batch, count); i < end; ++i) task(i);
  }
};

// Sleeping helpers beside the calling thread. Never destroyed: they may sleep until the process ends.
class Pool {
 public:
  void run(Job& job, int64_t helpers) {
    std::unique_lock<std::mutex> const only(caller_, std::try_to_lock);
    if (!only) return job.work();  // a second caller does its own work alone
    {
      std::lock_guard<std::mutex> const lock(mutex_);
      job_ = &job;
      seats_ = helpers;
      for (; alive_ < helpers; ++alive_) std::thread([this] { help(); }).detach();
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // a helper that wakes only now goes back to sleep
    idle_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++busy_;
      Job& job = *job_;
      lock.unlock();
      job.work();
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  int64_t seats_ = 0, busy_ = 0, alive_ = 0;
};

// Every OpenMP library has this entry; torch loads its own for all to see.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Threads {
  Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  std::atomic<Pool*> pool{nullptr};

  static Threads& instance() {
    static Threads threads;
    static int const registered = pthread_atfork(nullptr, nullptr, [] {
      threads.team = nullptr;
      threads.pool = nullptr;
    });
    (void)registered;
    return threads;
  }

  Pool& get_pool() {
    Pool* mine = pool;
    if (mine) return *mine;
    Pool* const fresh = new Pool;
    if (pool.compare_exchange_strong(mine, fresh)) return *fresh;
    delete fresh;
    return *mine;
  }
};

// task(0) .. task(count - 1), on at most `threads` threads; returns when all are done.
inline void run(int64_t count, int64_t threads, std::function<void(int64_t)> const& task) {
  threads = std::min(threads, count);
  Job job{task, count, std::max<int64_t>(1, count / (8 * threads))};
  if (threads <= 1) return job.work();
  Threads& all = Threads::instance();
  if (!all.team) return all.get_pool().run(job, threads - 1);
  all.team([](void* of) { static_cast<Job*>(of)->work(); }, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace
}  // namespace fastpref::cpu
