//! A disk of a real store behind a real vhost-user socket: what a guest is told is true.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockd::serve::vhost::{VhostOptions, VhostServer};
use blockd::serve::{Limits, Observer, Volume, VolumeEvent, VolumeOptions};
use blockd::store::Access;
use blockd::store::file::CacheMode;
use blockd::storedir::{NewDisk, OpenOptions, StoreDir, boot_id};
use offshoot_tests::load::{Load, loads};
use offshoot_tests::mount::Mount;
use offshoot_tests::pattern::{self, Found};
use offshoot_tests::rng::seed;
use offshoot_tests::served::read_back;
use offshoot_tests::store::TestStore;
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};
use vhost_blk::queue::F_RING_PACKED;

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;

/// A store with one disk, open in this process.
struct Bench {
    socket: PathBuf,
    store: StoreDir,
    _place: TestStore,
}

impl Bench {
    fn new() -> Bench {
        Bench::on(TestStore::new())
    }

    fn on(place: TestStore) -> Bench {
        let how = OpenOptions { access: Access::Write, cache: CacheMode::Auto, boot: boot_id() };
        let store = StoreDir::open(place.store(), &how).unwrap();
        store.create(&NewDisk::root("disk", SIZE)).unwrap();
        Bench { socket: place.path("blk.sock"), store, _place: place }
    }

    fn volume(&self, options: &VolumeOptions) -> Arc<Volume> {
        Volume::open(&self.store, "disk", options).unwrap()
    }

    fn serve(&self, volume: &Arc<Volume>, options: VhostOptions) -> VhostServer {
        let _ = std::fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket).unwrap();
        VhostServer::start(Arc::clone(volume), listener, options).unwrap()
    }

    fn connect(&self, options: Options) -> (Client, Vec<ClientQueue>) {
        let wanted = options.features & F_RING_PACKED != 0;
        let (client, queues) = Client::connect(&self.socket, options).unwrap();
        assert_eq!(client.features() & F_RING_PACKED != 0, wanted);
        (client, queues)
    }
}

fn options(queues: u16) -> Options {
    Options { queues, data_size: 2 << 20, ..Options::default() }
}

fn packed(queues: u16) -> Options {
    let options = options(queues);
    Options { features: options.features | F_RING_PACKED, ..options }
}

/// The loads of all queues at once, each on its part of the disk.
fn run_all(queues: Vec<ClientQueue>, requests: u64, seed: u64) -> Vec<Load> {
    let loads = loads(queues, SIZE, seed);
    std::thread::scope(|s| {
        let run = |mut load: Load| {
            s.spawn(move || {
                load.run(&mut |done| done < requests);
                load.verify();
                load
            })
        };
        let threads: Vec<_> = loads.into_iter().map(run).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn verified_load(client: Options, serve: VhostOptions) {
    let seed = seed(11);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test vhost_user");
    let bench = Bench::new();
    let volume = bench.volume(&VolumeOptions::default());
    let server = bench.serve(&volume, serve);
    let (front, queues) = bench.connect(client);

    let loads = run_all(queues, 4000, seed);

    assert_eq!(server.status().queues_running, usize::from(client.queues));
    drop(front);
    server.stop();
    let stats = volume.stats();
    assert_eq!(stats.in_flight, 0);
    assert!(stats.kinds.iter().all(|k| k.errors == 0 && k.requests > 0), "{stats:?}");
    volume.close().unwrap();
    read_back(&bench.store, "disk", &loads);
}

#[test]
fn every_request_of_a_verified_load_is_served_right_on_split_rings() {
    verified_load(options(2), VhostOptions { queues: 2, ..VhostOptions::default() });
}

#[test]
fn every_request_of_a_verified_load_is_served_right_on_packed_rings() {
    verified_load(packed(2), VhostOptions { queues: 2, poll_us_max: 0, ..VhostOptions::default() });
}

fn span(queue: &ClientQueue, len: u32) -> Span {
    Span { offset: queue.data().0, len }
}

fn write(queue: &mut ClientQueue, tag: u32, sector: u64, count: u64) -> u8 {
    let bytes = pattern::bytes(tag, sector, count);
    queue.arena().write(queue.data().0, &bytes);
    let span = span(queue, u32::try_from(bytes.len()).unwrap());
    queue.run(Op::Write, sector * 512, &[span], 20_000).unwrap().status
}

fn read(queue: &mut ClientQueue, sector: u64) -> Found {
    let span = span(queue, 512);
    assert_eq!(queue.run(Op::Read, sector * 512, &[span], 20_000).unwrap().status, 0);
    let mut bytes = [0; 512];
    queue.arena().read(queue.data().0, &mut bytes);
    pattern::look(&bytes, sector)
}

/// Story: a worker did everything that a guest had asked for at once before it showed any of it, so
/// that guest and worker waited for each other in turns: large reads from the page cache came more
/// slowly than from a server with slower copies.
#[test]
fn a_guest_gets_the_first_answers_while_the_last_are_worked_on() {
    const REQUESTS: u64 = 64;
    let bench = Bench::new();
    let volume = bench.volume(&VolumeOptions::default());
    let server = bench.serve(&volume, VhostOptions::default());
    let (front, mut queues) = bench.connect(options(1));
    let queue = &mut queues[0];
    let span = span(queue, 1 << 20);
    let mut answers_when_called = || {
        (0..REQUESTS).for_each(|i| queue.submit(Op::Read, 0, &[span], i).unwrap());
        queue.kick();
        assert!(queue.wait(20_000));
        let (mut first, mut all) = (0, 0);
        while all < REQUESTS {
            let seen = std::iter::from_fn(|| queue.poll()).inspect(|c| assert_eq!(c.status, 0));
            all += seen.count() as u64;
            first = if first == 0 { all } else { first };
            assert!(all == REQUESTS || queue.wait(20_000));
        }
        first
    };

    // Who is called may get a processor only when everything is done: then it is tried again.
    let early = (0..100).any(|_| answers_when_called() < REQUESTS);

    assert!(early, "all answers come at once");
    drop((front, queues));
    server.stop();
    volume.close().unwrap();
}

#[test]
fn a_larger_disk_is_served_as_soon_as_it_is_larger() {
    let bench = Bench::new();
    let volume = bench.volume(&VolumeOptions::default());
    let server = bench.serve(&volume, VhostOptions::default());
    let (_front, mut queues) = bench.connect(options(1));
    let queue = &mut queues[0];
    assert_eq!(write(queue, 1, SECTORS, 8), 1, "past the end");

    volume.disk().resize(2 * SIZE, false).unwrap();
    server.config_changed();

    assert_eq!(write(queue, 2, SECTORS, 8), 0);
    assert_eq!(read(queue, SECTORS + 7), Found::Tag(2));
}

#[test]
fn a_read_only_disk_refuses_writes_and_serves_reads() {
    let bench = Bench::new();
    let volume = bench.volume(&VolumeOptions::default());
    let _server = bench.serve(&volume, VhostOptions { read_only: true, ..Default::default() });
    let (_front, mut queues) = bench.connect(options(1));
    assert_eq!(write(&mut queues[0], 1, 0, 8), 1);
    assert_eq!(read(&mut queues[0], 0), Found::Zero);
}

#[test]
fn a_second_front_end_may_connect_and_not_run() {
    let bench = Bench::new();
    let volume = bench.volume(&VolumeOptions::default());
    let server = bench.serve(&volume, VhostOptions::default());
    let (first, mut queues) = bench.connect(options(1));
    assert_eq!(write(&mut queues[0], 3, 0, 8), 0);

    assert!(Client::connect(&bench.socket, options(1)).is_err(), "two guests on one disk");

    assert_eq!(read(&mut queues[0], 0), Found::Tag(3));
    drop(first);
    drop(queues);
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while server.status().queues_running > 0 {
        assert!(std::time::Instant::now() < end, "the first front end's queue stops");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (_second, mut queues) = bench.connect(options(1));
    assert_eq!(read(&mut queues[0], 0), Found::Tag(3));
}

#[test]
fn limits_are_kept() {
    let bench = Bench::new();
    let limits = Limits { iops: 200, ..Limits::default() };
    let volume = bench.volume(&VolumeOptions { limits, ..VolumeOptions::default() });
    let _server = bench.serve(&volume, VhostOptions::default());
    let (_front, mut queues) = bench.connect(options(1));
    let start = std::time::Instant::now();
    let mut requests = 0;
    while start.elapsed() < Duration::from_secs(2) {
        assert_eq!(read(&mut queues[0], 8), Found::Zero);
        requests += 1;
    }
    assert!((250..=450).contains(&requests), "{requests} in two seconds, 200/s allowed");
    volume.set_limits(Limits::default());
    let start = std::time::Instant::now();
    (0..500).for_each(|_| assert_eq!(read(&mut queues[0], 8), Found::Zero));
    assert!(start.elapsed() < Duration::from_secs(2), "limits that were lifted are gone");
}

#[test]
fn the_serial_number_is_the_name() {
    let bench = Bench::new();
    let volume = bench.volume(&VolumeOptions::default());
    let _server = bench.serve(&volume, VhostOptions::default());
    let (_front, mut queues) = bench.connect(options(1));
    let span = span(&queues[0], 20);
    assert_eq!(queues[0].run(Op::GetId, 0, &[span], 20_000).unwrap().status, 0);
    let mut id = [0xff; 20];
    queues[0].arena().read(span.offset, &mut id);
    assert_eq!(&id, b"disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

/// Story: a host's file system filled up, the guest's writes were answered with I/O errors, and its
/// own file system went read-only for good, although the operator freed space a minute later.
#[test]
fn writes_wait_while_the_host_is_full_and_go_on_when_it_is_not() {
    let test = "vhost_user::writes_wait_while_the_host_is_full_and_go_on_when_it_is_not";
    let Some(mount) = Mount::ext4(test, 96 << 20) else { return };
    let bench = Bench::on(TestStore::at(mount.path().join("store")));
    let events = Arc::new(Events::default());
    let observer: Arc<dyn Observer> = Arc::clone(&events) as Arc<dyn Observer>;
    let options = VolumeOptions { observer: Some(observer), ..VolumeOptions::default() };
    let volume = bench.volume(&options);
    let server = bench.serve(&volume, VhostOptions::default());
    let (_front, mut queues) = bench.connect(self::options(1));
    let queue = &mut queues[0];
    assert_eq!(write(queue, 1, 0, 8), 0);

    let full = mount.fill(0);
    // Extents and metadata that were set aside are used up first.
    let mut sector = 1024;
    while volume.stats().held.is_none() {
        assert!(sector < SECTORS, "a full host is noticed");
        let bytes = pattern::bytes(2, sector, 1024);
        queue.arena().write(queue.data().0, &bytes);
        let span = span(queue, 512 << 10);
        queue.submit(Op::Write, sector * 512, &[span], sector).unwrap();
        queue.kick();
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while queue.in_work() > 0 && volume.stats().held.is_none() {
            assert!(std::time::Instant::now() < until, "it completes or is held");
            if queue.wait(20) {
                assert_eq!(queue.poll().unwrap().status, 0);
            }
        }
        sector += 1024;
    }
    let held = volume.stats().held.unwrap();
    assert_eq!((held.requests, queue.in_work()), (1, 1), "{held:?}");
    assert!(held.reason.contains("space"), "{}", held.reason);
    assert!(!queue.wait(1500), "it is not answered, whether it is tried again or not");

    drop(full);
    volume.resume();

    assert!(queue.wait(20_000), "it goes on");
    assert_eq!(queue.poll().unwrap().status, 0);
    assert_eq!(read(queue, sector - 1024), Found::Tag(2));
    assert_eq!(read(queue, 7), Found::Tag(1));
    assert_eq!(volume.stats().held, None);
    let seen = events.0.lock().unwrap().clone();
    let held = seen.iter().filter(|e| matches!(e, VolumeEvent::Held(_))).count();
    let resumed = seen.iter().filter(|e| matches!(e, VolumeEvent::Resumed)).count();
    assert_eq!((held, resumed), (1, 1), "{seen:?}");
    server.stop();
    volume.close().unwrap();
}

#[derive(Default)]
struct Events(std::sync::Mutex<Vec<VolumeEvent>>);

impl Observer for Events {
    fn event(&self, volume: &str, event: VolumeEvent) {
        assert_eq!(volume, "disk");
        self.0.lock().unwrap().push(event);
    }
}
