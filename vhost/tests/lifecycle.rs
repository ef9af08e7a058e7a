//! What happens to a running device: resize, memory that comes and goes, logging, reset, stop,
//! migration of its state, and the hand-over to another process.

mod common;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::{Daemon, Disk, Event, Server, capabilities, load, packed};
use format::Result;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_blk::blk::Capabilities;
use vhost_blk::client::{Client, ClientQueue, GUEST_BASE, Op, Options, Span};
use vhost_blk::proto::{DeviceState, MemRegion, SingleMemRegion, request};
use vhost_blk::queue::Chain;
use vhost_blk::session::{ActiveQueue, Device, End, Session};

fn sector(q: &ClientQueue) -> Span {
    Span { offset: q.data().0, len: 512 }
}

fn two_queues() -> Options {
    Options { queues: 2, ..Options::default() }
}

#[test]
fn guest_sees_a_live_resize() {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let size = client.disk_size().unwrap();
    let at = sector(&queues[0]);
    assert_eq!(queues[0].run(Op::Read, size, &[at], 10_000).unwrap().status, 1);
    assert!(!client.config_changed(0).unwrap());
    daemon.disk.file.set_len(2 * size).unwrap();
    daemon.disk.caps.lock().unwrap().sectors *= 2;
    assert!(daemon.handle().config_changed().unwrap(), "the client has a channel");
    assert!(client.config_changed(10_000).unwrap());
    assert_eq!(client.disk_size().unwrap(), 2 * size);
    assert_eq!(queues[0].run(Op::Read, size, &[at], 10_000).unwrap().status, 0);
}

#[test]
fn resize_without_a_channel_is_not_announced() {
    let daemon = Daemon::new(capabilities(1));
    let options = Options { protocol: vhost_blk::proto::feature::CONFIG, ..Options::default() };
    let (mut client, _queues) = Client::connect(daemon.path(), options).unwrap();
    client.disk_size().unwrap();
    assert!(!daemon.handle().config_changed().unwrap());
}

#[test]
fn stop_of_a_ring_waits_for_everything_in_work() {
    stop_drains(Options::default(), 33);
    // Position 33 of the first round, in both directions.
    stop_drains(packed(Options::default()), 0x8021_8021);
}

fn stop_drains(options: Options, position: u32) {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, mut queues) = Client::connect(daemon.path(), options).unwrap();
    let q = &mut queues[0];
    let at = sector(q);
    q.run(Op::Read, 0, &[at], 10_000).unwrap();
    daemon.disk.hold.store(true, Ordering::Relaxed);
    for token in 0..32 {
        q.submit(Op::Read, 0, &[at], token).unwrap();
    }
    q.kick();
    assert!(!q.wait(50), "the disk holds them");
    assert_eq!(client.stop_queue(0).unwrap(), position, "the position is after the last request");
    assert_eq!(std::iter::from_fn(|| q.poll()).count(), 32, "all are done when the stop returns");

    q.submit(Op::Read, 0, &[at], 7).unwrap();
    q.kick();
    assert!(!q.wait(50), "a stopped ring is silent");
    daemon.disk.hold.store(false, Ordering::Relaxed);
    client.start_queue(0, position).unwrap();
    assert!(q.wait(10_000), "what waited is found at the start");
    assert_eq!(q.poll().unwrap().token, 7);
}

#[test]
fn disabled_ring_is_silent_and_goes_on_when_enabled() {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let q = &mut queues[0];
    let at = sector(q);
    q.run(Op::Read, 0, &[at], 10_000).unwrap();
    let mut enable = |num: u32| {
        let state = vhost_blk::proto::VringState { index: 0, num };
        client.front_end().tell(request::SET_VRING_ENABLE, &state, &[]).unwrap();
    };
    enable(0);
    q.submit(Op::Read, 0, &[at], 1).unwrap();
    q.kick();
    assert!(!q.wait(50));
    enable(1);
    assert!(q.wait(10_000));
}

#[test]
fn memory_comes_and_goes_under_load() {
    let daemon = Daemon::new(capabilities(2));
    let (mut client, mut queues) = Client::connect(daemon.path(), two_queues()).unwrap();
    let mut q = queues.pop().unwrap();
    let mut other = queues.pop().unwrap();
    let quit = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| load(&mut other, 0, 2, |_| !quit.load(Ordering::Relaxed)));
        for round in 0..50u64 {
            let file = memfd_create("slot", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, 1 << 16).unwrap();
            // The new region follows the arena: a buffer over both is one range.
            let guest = GUEST_BASE + q.arena().size();
            let region = MemRegion { guest, size: 1 << 16, user: 1 << 46, offset: 0 };
            let region = SingleMemRegion { padding: 0, region };
            let front = client.front_end();
            front.tell(request::ADD_MEM_REG, &region, &[file.as_fd()]).unwrap();
            let end = q.arena().size();
            q.arena().write(end - 256, &[round.to_le_bytes()[0]; 256]);
            rustix::io::pwrite(&file, &[7; 256], 0).unwrap();
            let over = Span { offset: end - 256, len: 512 };
            let disk_half = daemon.disk.caps.lock().unwrap().sectors * 256;
            assert_eq!(q.run(Op::Write, disk_half, &[over], 10_000).unwrap().status, 0);
            let mut seen = [0; 512];
            use std::os::unix::fs::FileExt;
            daemon.disk.file.read_exact_at(&mut seen, disk_half).unwrap();
            assert_eq!((seen[0], seen[511]), (round.to_le_bytes()[0], 7));
            front.tell(request::REM_MEM_REG, &region, &[]).unwrap();
        }
        quit.store(true, Ordering::Relaxed);
    });
    let over = Span { offset: q.arena().size() - 256, len: 512 };
    q.submit(Op::Write, 0, &[over], 1).unwrap();
    q.kick();
    let failed = daemon.wait_for(|e| matches!(e, Event::QueueFailed(..)));
    assert!(matches!(failed, Event::QueueFailed(1, why) if why.contains("not in guest memory")));
}

/// Pages of the arena that differ, as guest page numbers.
fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    pages.filter(|(_, (a, b))| a != b).map(|(i, _)| GUEST_BASE / 4096 + i as u64).collect()
}

fn contents(q: &ClientQueue) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(q.arena().size()).unwrap()];
    q.arena().read(0, &mut bytes);
    bytes
}

#[test]
fn log_names_every_page_that_the_device_wrote_and_few_others() {
    log_is_exact(Options::default());
    log_is_exact(packed(Options::default()));
}

fn log_is_exact(options: Options) {
    let daemon = Daemon::new(capabilities(1));
    use std::os::unix::fs::FileExt;
    daemon.disk.file.write_all_at(&[0xaa; 1 << 20], 0).unwrap();
    let (mut client, mut queues) = Client::connect(daemon.path(), options).unwrap();
    let q = &mut queues[0];
    let data = q.data().0;
    q.run(Op::Read, 0, &[sector(q)], 10_000).unwrap();
    daemon.disk.hold.store(true, Ordering::Relaxed);
    let submit = |q: &mut ClientQueue, i: u64| {
        let at = Span { offset: data + i * 20_000 + 4000, len: 5120 };
        q.submit(Op::Read, i * 5120, &[at], i).unwrap();
    };
    // In work when logging begins, or after: both must be logged.
    (0..20).for_each(|i| submit(q, i));
    q.kick();
    assert!(!q.wait(50));
    let log = client.start_log().unwrap();
    (20..40).for_each(|i| submit(q, i));
    q.submit(Op::Write, 512, &[sector(q)], 40).unwrap();
    q.submit(Op::GetId, 0, &[Span { offset: data + (1 << 20) - 4096, len: 20 }], 41).unwrap();
    q.kick();
    assert!(!q.wait(50));
    let before = contents(q);
    daemon.disk.hold.store(false, Ordering::Relaxed);
    while q.in_work() > 0 {
        assert!(q.wait(10_000));
        while q.poll().is_some() {}
    }
    let base = client.stop_queue(0).unwrap();
    let written = changed(&before, &contents(q));
    let marked: BTreeSet<u64> = log.take().into_iter().collect();
    assert!(written.len() > 80, "{}", written.len());
    let missing: Vec<_> = written.difference(&marked).collect();
    assert!(missing.is_empty(), "written and not marked: {missing:x?}");
    let extra: Vec<_> = marked.difference(&written).collect();
    assert!(extra.len() <= 2, "marked and not written: {extra:x?}");

    client.stop_log().unwrap();
    client.start_queue(0, base).unwrap();
    q.run(Op::Read, 0, &[sector(q)], 10_000).unwrap();
    assert_eq!(log.take(), [0u64; 0], "nothing is logged after the log was switched off");
}

#[test]
fn rings_go_on_after_a_clean_restart_of_the_daemon() {
    use vhost_blk::proto::feature::INFLIGHT_SHMFD;
    let all = Options { queue_size: 16, ..Options::default() };
    let untracked = Options { protocol: all.protocol & !INFLIGHT_SHMFD, ..all };
    for options in [all, untracked, packed(all)] {
        let daemon = Daemon::new(capabilities(1));
        let (mut client, mut queues) = Client::connect(daemon.path(), options).unwrap();
        let at = sector(&queues[0]);
        for round in 0..5 {
            for _ in 0..7 + round {
                queues[0].run(Op::Read, 0, &[at], 10_000).unwrap();
            }
            daemon.handle().stop();
            assert_eq!(daemon.end(), Ok(End::Stopped));
            // What arrives while no daemon runs waits in the ring.
            queues[0].submit(Op::Flush, 0, &[], round).unwrap();
            queues[0].kick();
            client.reconnect(daemon.path()).unwrap();
            assert!(queues[0].wait(10_000));
            assert_eq!(queues[0].poll().unwrap().token, round);
        }
    }
    let untracked = packed(untracked);
    let daemon = Daemon::new(capabilities(1));
    let (mut client, _queues) = Client::connect(daemon.path(), untracked).unwrap();
    assert!(client.reconnect(daemon.path()).is_err(), "nobody would know the position");
}

#[test]
fn log_survives_a_reconnect() {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let log = client.start_log().unwrap();
    client.reconnect(daemon.path()).unwrap();
    let q = &mut queues[0];
    let _ = log.take();
    q.run(Op::Read, 0, &[sector(q)], 10_000).unwrap();
    client.stop_queue(0).unwrap();
    assert!(log.is_marked((GUEST_BASE + q.data().0) / 4096));
}

/// A guest that QEMU migrated while the daemon was killed ran on at its destination without what
/// the dead daemon had read into its memory: QEMU throws the log of a broken connection away
/// unread. So whoever comes back in the middle of a migration is told that all memory was written.
#[test]
fn who_comes_back_while_it_logs_copies_all_memory_again() {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let log = client.start_log().unwrap();
    assert!(log.take().len() <= 1, "nobody died: at most the ring itself was written");
    let at = sector(&queues[0]);
    queues[0].run(Op::Read, 0, &[at], 10_000).unwrap();
    let _ = log.take(); // with the connection, the front end loses what was logged
    client.reconnect(daemon.path()).unwrap();
    let (pages, ends) = (log.take(), log.size() as u64 * 8);
    let all = (GUEST_BASE / 4096..).take(pages.len());
    assert!(all.eq(pages.iter().copied()) && ends - pages[pages.len() - 1] <= 8, "{pages:?}");
    // And once only: a ring that starts anew is nobody's successor.
    client.stop_log().unwrap();
    client.start_log().unwrap();
    assert!(log.take().len() <= 1);
}

#[test]
fn reset_brings_the_device_back_to_its_first_state() {
    for by_status in [false, true] {
        let daemon = Daemon::new(capabilities(1));
        let (mut client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
        let at = sector(&queues[0]);
        queues[0].run(Op::Read, 0, &[at], 10_000).unwrap();
        client.set_write_cache(false).unwrap();
        let features = client.features();
        let front = client.front_end();
        front.tell(request::SET_STATUS, &0xfu64, &[]).unwrap();
        match by_status {
            true => front.tell(request::SET_STATUS, &0u64, &[]).unwrap(),
            false => front.tell(request::RESET_DEVICE, &[0u8; 0], &[]).unwrap(),
        }
        let status: u64 = front.ask(request::GET_STATUS, &[0u8; 0], &[]).unwrap().0;
        assert_eq!(status, 0);
        front.tell(request::SET_FEATURES, &features, &[]).unwrap();
        // A pause of the guest also sets status 0, and must not forget what the guest relies on.
        assert_eq!(client.write_cache().unwrap(), !by_status);
        queues[0].submit(Op::Read, 0, &[at], 1).unwrap();
        queues[0].kick();
        assert!(!queues[0].wait(50), "no ring runs after a reset");
        client.start_queue(0, 1).unwrap();
        assert!(queues[0].wait(10_000));
    }
}

#[test]
fn broken_ring_shows_in_the_device_status() {
    let daemon = Daemon::new(capabilities(1));
    let (mut client, queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let q = &queues[0];
    q.arena().write(q.place().ring.driver + 2, &5000u16.to_le_bytes());
    client.kick(0);
    daemon.wait_for(|e| matches!(e, Event::QueueFailed(..)));
    let status: u64 = client.front_end().ask(request::GET_STATUS, &[0u8; 0], &[]).unwrap().0;
    assert_eq!(status & 0x40, 0x40, "device needs reset");
}

#[test]
fn device_state_carries_the_cache_mode_to_another_daemon() {
    let source = Daemon::new(capabilities(1));
    let target = Daemon::new(capabilities(1));
    let (mut a, _qa) = Client::connect(source.path(), Options::default()).unwrap();
    let (mut b, _qb) = Client::connect(target.path(), Options::default()).unwrap();
    a.set_write_cache(false).unwrap();
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let start = |c: &mut Client, direction, end: &std::os::fd::OwnedFd| -> u64 {
        let state = DeviceState { direction, phase: 0 };
        c.front_end().ask(request::SET_DEVICE_STATE_FD, &state, &[end.as_fd()]).unwrap().0
    };
    let check = |c: &mut Client| -> u64 {
        c.front_end().ask(request::CHECK_DEVICE_STATE, &[0u8; 0], &[]).unwrap().0
    };
    assert_eq!(start(&mut a, 0, &write), 0x101, "not while a ring runs");
    a.stop_queue(0).unwrap();
    b.stop_queue(0).unwrap();
    assert_eq!(start(&mut a, 0, &write), 0x100);
    assert_eq!(check(&mut a), 0);
    drop(write);
    assert_eq!(start(&mut b, 1, &read), 0x100);
    assert_eq!(check(&mut b), 0);
    assert!(!b.write_cache().unwrap());
    assert_eq!(start(&mut b, 1, &read), 0x100);
    assert_ne!(check(&mut b), 0, "an empty state is none");
    assert_ne!(check(&mut b), 0, "nothing was started");
}

/// A device whose workers take a request and die.
struct Dying(mpsc::Sender<()>);

impl Device for Dying {
    fn capabilities(&self) -> Capabilities {
        capabilities(1)
    }

    fn start_queue(&mut self, mut queue: ActiveQueue) -> Result<()> {
        let sender = self.0.clone();
        std::thread::spawn(move || {
            let mut chain = Chain::new();
            while !queue.pop(&mut chain) {
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(queue);
            let _ = sender.send(());
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
        assert!(error.reason().contains("requests in work"), "{error}");
    }
}

#[test]
fn worker_that_dies_hangs_nobody_and_is_noticed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, died) = mpsc::channel();
    let session = std::thread::spawn(move || {
        let mut device = Dying(sender);
        let (mut session, _handle) = Session::new(theirs, &device).unwrap();
        session.run(&mut device)
    });
    let (mut client, mut queues) = Client::start(ours, Options::default()).unwrap();
    queues[0].submit(Op::Flush, 0, &[], 1).unwrap();
    queues[0].kick();
    died.recv_timeout(Duration::from_secs(10)).unwrap();
    client.stop_queue(0).unwrap();
    drop(client);
    assert_eq!(session.join().unwrap().unwrap(), End::Disconnected);
}

#[test]
fn session_moves_to_a_successor_under_load() {
    moves_under_load(two_queues());
    moves_under_load(packed(two_queues()));
}

fn moves_under_load(options: Options) {
    let disk = Disk::temporary(capabilities(2));
    let (events, _keep) = mpsc::channel();
    let server = || Server {
        disk: disk.clone(),
        events: events.clone(),
        cache: Arc::default(),
        workers: Vec::new(),
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut device = server();
    let (mut session, mut handle) = Session::new(theirs, &device).unwrap();
    let mut running = Some(std::thread::spawn(move || (session.run(&mut device), session)));
    let (mut client, queues) = Client::start(ours, options).unwrap();
    let log = client.start_log().unwrap();
    client.set_write_cache(false).unwrap();
    let quit = AtomicBool::new(false);
    let mut worst = Duration::ZERO;
    std::thread::scope(|scope| {
        for (i, mut q) in queues.into_iter().enumerate() {
            let quit = &quit;
            scope.spawn(move || load(&mut q, i as u64, 2, |_| !quit.load(Ordering::Relaxed)));
        }
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(10));
            let start = Instant::now();
            handle.stop();
            let (end, session) = running.take().unwrap().join().unwrap();
            assert_eq!(end.unwrap(), End::Stopped);
            let parcel = session.into_handover().unwrap();
            let mut device = server();
            let (mut session, next) = Session::from_handover(parcel, &device).unwrap();
            handle = next;
            running = Some(std::thread::spawn(move || (session.run(&mut device), session)));
            worst = worst.max(start.elapsed());
            // The front end goes on as if nothing had happened.
            assert!(!client.write_cache().unwrap());
            disk.caps.lock().unwrap().sectors += 1;
            assert!(handle.config_changed().unwrap());
            assert!(client.config_changed(10_000).unwrap());
            assert!(!log.take().is_empty());
        }
        quit.store(true, Ordering::Relaxed);
    });
    println!("longest hand-over: {worst:?}");
    drop(client);
    assert_eq!(running.unwrap().join().unwrap().0.unwrap(), End::Disconnected);
}

#[test]
fn damaged_parcel_is_refused() {
    let disk = Disk::temporary(capabilities(1));
    let (events, _keep) = mpsc::channel();
    let cache = Arc::default();
    let mut device = Server { disk, events, cache, workers: Vec::new() };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut session, handle) = Session::new(theirs, &device).unwrap();
    let client = std::thread::spawn(move || Client::start(ours, Options::default()).unwrap());
    let stopper = std::thread::spawn(move || {
        let client = client.join().unwrap();
        handle.stop();
        client
    });
    session.run(&mut device).unwrap();
    let _client = stopper.join().unwrap();
    let parcel = session.into_handover().unwrap();
    let copy = |files: &[std::os::fd::OwnedFd]| {
        files.iter().map(|f| f.try_clone().unwrap()).collect::<Vec<_>>()
    };
    let all = parcel.files.len();
    for (cut, files, first) in
        [(8, all, 0u8), (0, all - 1, 0), (parcel.numbers.len(), all, 0), (0, all, 1)]
    {
        let mut numbers = parcel.numbers[..parcel.numbers.len() - cut].to_vec();
        if let Some(byte) = numbers.first_mut() {
            *byte ^= first;
        }
        let files = copy(&parcel.files[..files]);
        let parcel = vhost_blk::session::Handover { numbers, files };
        assert!(Session::from_handover(parcel, &device).is_err(), "cut {cut}");
    }
    Session::from_handover(parcel, &device).unwrap();
}
