//! Taking, doing and completing requests allocates nothing.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use common::capabilities;
use format::Result;
use vhost_blk::blk::{Capabilities, RangeList, Status};
use vhost_blk::client::{Client, Op, Options, Span};
use vhost_blk::queue::Chain;
use vhost_blk::session::{ActiveQueue, Control, Device, Session};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything through to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: the caller keeps the contract of `GlobalAlloc`.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the caller keeps the contract of `GlobalAlloc`.
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Completes everything at once and reports how many allocations its worker made per run.
struct Null(mpsc::Sender<(u64, u64)>);

impl Device for Null {
    fn capabilities(&self) -> Capabilities {
        capabilities(1)
    }

    fn start_queue(&mut self, mut queue: ActiveQueue) -> Result<()> {
        let (sender, limits) = (self.0.clone(), capabilities(1).limits(queue.features()));
        std::thread::spawn(move || {
            let (mut chain, mut list, mut done) = (Chain::new(), RangeList::default(), 0);
            let before = ALLOCATIONS.with(Cell::get);
            while queue.control() == Control::Run {
                while queue.take(&limits, &mut chain, &mut list).is_some() {
                    queue.finish(&mut chain, Status::Ok);
                    done += 1;
                }
                queue.publish();
                if !queue.enable_kicks() && queue.kick().wait(1) {
                    queue.kick().drain();
                }
            }
            let _ = sender.send((done, ALLOCATIONS.with(Cell::get) - before));
        });
        Ok(())
    }

    fn write_cache_changed(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn remembered_write_cache(&self) -> Option<bool> {
        None
    }

    fn queue_failed(&mut self, _: u16, error: &format::Error) {
        panic!("{error}");
    }
}

#[test]
fn ten_thousand_requests_allocate_nothing() {
    allocate_nothing(Options::default());
    allocate_nothing(common::packed(Options::default()));
}

fn allocate_nothing(options: Options) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, report) = mpsc::channel();
    let session = std::thread::spawn(move || {
        let mut device = Null(sender);
        let (mut session, _handle) = Session::new(theirs, &device).unwrap();
        session.run(&mut device).unwrap()
    });
    let (mut client, mut queues) = Client::start(ours, options).unwrap();
    let q = &mut queues[0];
    let span = Span { offset: q.data().0, len: 4096 };
    let mut completed = 0;
    for round in 0..160u64 {
        for i in 0..64 {
            let op = match (round + i) % 8 {
                0 => Op::Flush,
                1 => Op::WriteZeroes { ranges: &[(0, 4096)], unmap: true },
                2 => Op::Other(77),
                n if n % 2 == 0 => Op::Write,
                _ => Op::Read,
            };
            let spans: &[Span] = if matches!(op, Op::Read | Op::Write) { &[span] } else { &[] };
            q.submit(op, 0, spans, i).unwrap();
        }
        q.kick();
        while q.in_work() > 0 {
            assert!(q.wait(10_000));
            while q.poll().is_some() {
                completed += 1;
            }
        }
    }
    client.stop_queue(0).unwrap();
    let (done, allocations) = report.recv().unwrap();
    assert_eq!((completed, allocations), (160 * 64, 0));
    assert_eq!(done, completed * 7 / 8, "the rest was refused on the way");
    drop(client);
    session.join().unwrap();
}
