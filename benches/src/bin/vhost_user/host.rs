//! What the host gives without any server: the same requests, made by threads of the load straight
//! to a file, one thread for each queue. No server can give more.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use blockd::store::buf::AlignedBuf;
use io_uring::{IoUring, opcode, types};

use super::load::{Job, Rng, place};

/// One thread's share of a job.
struct Share<'a> {
    job: &'a Job,
    file: File,
    /// First byte, and number of blocks.
    from: u64,
    blocks: u64,
    rng: Rng,
    next: u64,
}

impl Share<'_> {
    /// Where the next request goes, and whether it writes.
    fn step(&mut self) -> (u64, bool) {
        let at = place(self.job, &mut self.rng, self.next, self.blocks);
        self.next += 1;
        (self.from + at.expect("it never ends"), self.rng.below(100) < self.job.write_percent)
    }

    /// One at a time through the page cache: a copy is done when the call returns.
    fn copy(mut self, time: Duration) -> u64 {
        let mut buf = AlignedBuf::zeroed(usize::try_from(self.job.block).expect("a block size"));
        let (start, mut done) = (Instant::now(), 0);
        while start.elapsed() < time {
            let moved = match self.step() {
                (at, true) => self.file.write_all_at(&buf, at),
                (at, false) => self.file.read_exact_at(&mut buf, at),
            };
            moved.expect("the file takes requests");
            done += 1;
        }
        done
    }

    /// As many at a time as a queue of the job has, past the page cache.
    fn queue(mut self, time: Duration) -> u64 {
        let entries = u32::try_from(self.job.depth).expect("a depth");
        let mut ring = IoUring::new(entries).expect("a ring");
        let size = usize::try_from(self.job.block).expect("a block size");
        let mut bufs: Vec<_> = (0..entries).map(|_| AlignedBuf::zeroed(size)).collect();
        let mut free: Vec<u32> = (0..entries).collect();
        let (start, mut done) = (Instant::now(), 0);
        while start.elapsed() < time || free.len() < bufs.len() {
            while start.elapsed() < time
                && let Some(slot) = free.pop()
            {
                self.push(&mut ring, slot, &mut bufs[slot as usize]);
            }
            ring.submit_and_wait(1).expect("the ring takes requests");
            for entry in ring.completion() {
                assert!(entry.result() > 0, "the file takes requests");
                free.push(u32::try_from(entry.user_data()).expect("a slot"));
                done += 1;
            }
        }
        done
    }

    fn push(&mut self, ring: &mut IoUring, slot: u32, buf: &mut AlignedBuf) {
        let fd = types::Fd(self.file.as_raw_fd());
        let len = u32::try_from(buf.len()).expect("a block size");
        let entry = match self.step() {
            (at, true) => opcode::Write::new(fd, buf.as_ptr(), len).offset(at).build(),
            (at, false) => opcode::Read::new(fd, buf.as_mut_ptr(), len).offset(at).build(),
        };
        // SAFETY: the buffer belongs to the slot, and both outlive the request: a share ends when
        // all slots are free.
        let pushed = unsafe { ring.submission().push(&entry.user_data(slot.into())) };
        pushed.expect("an entry for each slot");
    }
}

/// Requests in a second of a job against `path`.
pub fn run(job: &Job, path: &Path, buffered: bool, time: Duration) -> f64 {
    let part = job.span / u64::from(job.queues);
    let start = Instant::now();
    let done: u64 = std::thread::scope(|s| {
        let threads: Vec<_> = (0..u64::from(job.queues))
            .map(|i| {
                let flags = if buffered { 0 } else { libc::O_DIRECT };
                let mut how = File::options();
                let file = how.read(true).write(true).custom_flags(flags).open(path);
                let file = file.expect("the file opens");
                let (from, blocks, rng) = (i * part, part / job.block, Rng::new(i * part));
                let share = Share { job, file, from, blocks, rng, next: 0 };
                s.spawn(move || if buffered { share.copy(time) } else { share.queue(time) })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread of the load")).sum()
    });
    done as f64 / start.elapsed().as_secs_f64()
}
