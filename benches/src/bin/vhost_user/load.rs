//! A load on the queues of a vhost-user disk, the same for every server.

use std::time::{Duration, Instant};

use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

/// Where requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Anywhere.
    Random,
    /// One behind the other.
    Sequential,
    /// In steps of so many bytes, in no order, and nowhere twice; then the load ends. A step larger
    /// than a request is touched in one block somewhere.
    Once(u64),
}

/// What one measurement does.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// For the report.
    pub name: &'static str,
    /// Queues, each with a client thread.
    pub queues: u16,
    /// Requests in work for each queue.
    pub depth: u64,
    /// Bytes of a request.
    pub block: u64,
    /// Requests of a hundred that write.
    pub write_percent: u64,
    /// Where they go.
    pub order: Order,
    /// A flush after each write.
    pub flush: bool,
    /// Bytes from the start of the disk that are used.
    pub span: u64,
    /// A flush when all is done, which counts as part of the load.
    pub flush_at_end: bool,
    /// The client looks for completions without sleeping.
    pub client_polls: bool,
    /// The processor of the client's threads, if they have one.
    pub client_cpu: Option<usize>,
}

/// What came out.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Requests in a second.
    pub iops: f64,
    /// Time that half of the requests took at most.
    pub p50_us: f64,
    /// Time that 99 of a hundred took at most.
    pub p99_us: f64,
    /// Processor time of the server for each request, in microseconds.
    pub cpu_us: f64,
}

/// Processor time of a process so far, user and system, of all its threads, in seconds. Finer than
/// the hundredths in its `stat` file: some loads take no longer than ten of them.
pub fn cpu_seconds(pid: u32) -> f64 {
    let pid = libc::pid_t::try_from(pid).expect("a process id");
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: both calls write to the places that they are given, and nowhere else.
    let read = unsafe {
        libc::clock_getcpuclockid(pid, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    assert!(read, "the server runs");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Numbers in no order.
pub struct Rng(u64);

impl Rng {
    /// A sequence of its own for each start.
    pub fn new(start: u64) -> Rng {
        Rng(start | 0x9e37_79b9)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Runs a job against the server `pid` behind `socket`.
pub fn run(job: &Job, socket: &std::path::Path, pid: u32, time: Duration) -> Outcome {
    let options = Options {
        queues: job.queues,
        queue_size: 128,
        data_size: job.depth * job.block,
        ..Options::default()
    };
    let (client, queues) = Client::connect(socket, options).expect("the server answers");
    // Warm: threads started, poll times settled. What can be written first only once stays cold.
    let queues = match job.order {
        Order::Once(_) => queues,
        _ => drive(job, queues, time / 5).0,
    };
    let (cpu, start) = (cpu_seconds(pid), Instant::now());
    let (mut queues, mut latencies) = drive(job, queues, time);
    if job.flush_at_end {
        let queue = &mut queues[0];
        queue.submit(Op::Flush, 0, &[], 0).expect("room in the ring");
        queue.kick();
        assert!(queue.wait(120_000), "the server answers");
        assert_eq!(queue.poll().map(|done| done.status), Some(0));
    }
    let (took, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds(pid) - cpu);
    drop((queues, client));
    latencies.sort_unstable();
    let at = |percent: usize| f64::from(latencies[(latencies.len() - 1) * percent / 100]) / 1000.0;
    let count = latencies.len() as f64;
    Outcome { iops: count / took, p50_us: at(50), p99_us: at(99), cpu_us: cpu * 1e6 / count }
}

fn drive(job: &Job, queues: Vec<ClientQueue>, time: Duration) -> (Vec<ClientQueue>, Vec<u32>) {
    let part = job.span / queues.len() as u64;
    std::thread::scope(|s| {
        let threads: Vec<_> = (0u64..)
            .zip(queues)
            .map(|(i, queue)| s.spawn(move || drive_one(job, queue, (i * part, part), time)))
            .collect();
        let mut all = (Vec::new(), Vec::new());
        for thread in threads {
            let (queue, latencies) = thread.join().expect("a load thread");
            all.0.push(queue);
            all.1.extend(latencies);
        }
        all
    })
}

/// Where request number `next` goes, in bytes; `None` when everything was met.
pub fn place(job: &Job, rng: &mut Rng, next: u64, blocks: u64) -> Option<u64> {
    match job.order {
        Order::Random => Some(job.block * rng.below(blocks)),
        Order::Sequential => Some(job.block * (next % blocks)),
        Order::Once(_) if next == blocks => None,
        // Odd, so that it meets every one of a power of two.
        Order::Once(step) => {
            let inside = job.block * rng.below(step / job.block);
            Some(step * (next.wrapping_mul(0x9e37_79b1) % blocks) + inside)
        }
    }
}

/// Keeps the calling thread on one processor.
fn pin(cpu: usize) {
    // SAFETY: a plain set of bits, for which zeroes are a value; the calls write to it only.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        let code = libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
        assert_eq!(code, 0, "processor {cpu} can be used");
    }
}

fn drive_one(
    job: &Job,
    mut queue: ClientQueue,
    (from, len): (u64, u64),
    time: Duration,
) -> (ClientQueue, Vec<u32>) {
    if let Some(cpu) = job.client_cpu {
        pin(cpu);
    }
    let mut rng = Rng::new(from);
    let blocks = match job.order {
        Order::Once(step) => len / step,
        _ => len / job.block,
    };
    let (mut next, mut latencies) = (0, Vec::with_capacity(1 << 20));
    let mut began = vec![Instant::now(); usize::try_from(job.depth).expect("a depth")];
    let mut flushing = vec![false; began.len()];
    let mut free: Vec<u64> = (0..job.depth).collect();
    let start = Instant::now();
    loop {
        let now = Instant::now();
        let goes_on = match job.order {
            Order::Once(_) => next < blocks,
            _ => now - start < time,
        };
        if goes_on {
            while let Some(slot) = free.pop() {
                let Some(at) = place(job, &mut rng, next, blocks) else {
                    free.push(slot);
                    break;
                };
                next += 1;
                let op = if rng.below(100) < job.write_percent { Op::Write } else { Op::Read };
                let offset = queue.data().0 + slot * job.block;
                let span = Span { offset, len: u32::try_from(job.block).expect("a block size") };
                queue.submit(op, from + at, &[span], slot).expect("room in the ring");
                let slot = usize::try_from(slot).expect("a slot");
                (began[slot], flushing[slot]) = (now, false);
            }
        } else if queue.in_work() == 0 {
            return (queue, latencies);
        }
        queue.kick();
        if job.client_polls {
            while !poll(job, &mut queue, (&mut began, &mut flushing), &mut free, &mut latencies) {
                std::hint::spin_loop();
            }
        } else {
            assert!(queue.wait(30_000), "the server answers");
            poll(job, &mut queue, (&mut began, &mut flushing), &mut free, &mut latencies);
        }
    }
}

fn poll(
    job: &Job,
    queue: &mut ClientQueue,
    (began, flushing): (&mut [Instant], &mut [bool]),
    free: &mut Vec<u64>,
    latencies: &mut Vec<u32>,
) -> bool {
    let (mut any, mut now) = (false, None);
    while let Some(done) = queue.poll() {
        assert_eq!(done.status, 0);
        let slot = usize::try_from(done.token).expect("a slot");
        any = true;
        if job.flush && !flushing[slot] {
            flushing[slot] = true;
            queue.submit(Op::Flush, 0, &[], done.token).expect("room in the ring");
            queue.kick();
            continue;
        }
        let took = now.get_or_insert_with(Instant::now).duration_since(began[slot]);
        latencies.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
        free.push(done.token);
    }
    any
}
