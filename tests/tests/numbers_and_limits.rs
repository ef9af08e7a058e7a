//! What `/metrics` tells of a disk moves with what its guest does, and limits limit the guest.

use std::time::{Duration, Instant};

use offshoot_tests::daemon::Daemon;
use offshoot_tests::mount::Mount;
use offshoot_tests::store::TestStore;
use offshoot_tests::until;
use vhost_blk::client::{Client, ClientQueue, Op, Options, Span};

const MIB: u64 = 1 << 20;

/// A disk `a` of a daemon, and a guest's queue on it.
struct Guest {
    daemon: Daemon,
    bench: TestStore,
    queue: ClientQueue,
    _client: Client,
}

impl Guest {
    fn new(bench: TestStore) -> Self {
        let daemon = bench.daemon();
        bench.done(&["disk", "create", "a", "--size", "256M"]);
        let socket = bench.path("a.sock");
        bench.done(&["disk", "attach", "a", "--socket", socket.to_str().unwrap()]);
        let options = Options { data_size: 2 << 20, ..Options::default() };
        let (client, mut queues) = Client::connect(&socket, options).unwrap();
        Guest { daemon, bench, queue: queues.remove(0), _client: client }
    }

    /// A number of the disk.
    fn number(&self, name: &str) -> u64 {
        let text = String::from_utf8(self.daemon.ask("GET", "/metrics", b"").body).unwrap();
        let start = format!("offshoot_disk_{name}{{disk=\"a\"}} ");
        let found = text.lines().find_map(|line| line.strip_prefix(&start));
        found.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    fn limit(&self, limits: &[&str]) {
        self.bench.done(&[&["disk", "limits", "a"], limits].concat());
    }

    fn submit(&mut self, op: Op, offset: u64, len: u32) {
        let span = Span { offset: self.queue.data().0, len };
        let spans = if len == 0 { &[][..] } else { &[span] };
        self.queue.submit(op, offset, spans, offset).unwrap();
        self.queue.kick();
    }

    fn run(&mut self, op: Op, offset: u64, len: u32) {
        self.submit(op, offset, len);
        self.complete(1);
    }

    /// Waits until so many requests have completed well.
    fn complete(&mut self, mut count: u32) {
        while count > 0 {
            assert!(self.queue.wait(20_000), "{count} requests never complete");
            while let Some(done) = self.queue.poll() {
                assert_eq!(done.status, 0);
                count -= 1;
            }
        }
    }

    /// How long so many requests take, one after the other.
    fn time(&mut self, op: Op, count: u64, len: u32) -> Duration {
        let start = Instant::now();
        (0..count).for_each(|i| self.run(op, i * u64::from(len), len));
        start.elapsed()
    }
}

#[test]
fn requests_that_wait_are_counted() {
    let mut guest = Guest::new(TestStore::new());
    assert_eq!(guest.number("in_flight"), 0);
    // One may go at once, and is paid for in the next ten seconds.
    guest.limit(&["--bps", "100"]);
    (0..9).for_each(|i| guest.submit(Op::Write, i * 4096, 1024));

    until("eight wait", || guest.number("in_flight") == 8);

    guest.limit(&["--bps", "0"]);
    guest.complete(9);
    until("none waits", || guest.number("in_flight") == 0);
}

#[test]
fn the_journal_fills_and_is_emptied() {
    let mut guest = Guest::new(TestStore::new());
    let pages = guest.number("journal_pages");
    assert!(pages > 16, "{pages}");
    let mut most = guest.number("journal_pages_used");
    // Each flush closes a page with the record of a first write.
    for i in 1.. {
        guest.run(Op::Write, i * 4096, 4096);
        guest.run(Op::Flush, 0, 0);
        if i % 8 != 0 {
            continue;
        }
        let used = guest.number("journal_pages_used");
        assert!(used <= pages && i <= pages, "{used} pages of {pages} after {i} flushes");
        if used < most {
            // A checkpoint emptied it.
            assert!(most > i / 2, "{most} pages at most, of {i} flushes");
            break;
        }
        most = used;
    }
    assert_eq!(guest.number("journal_pages"), pages);
}

/// A guest that asks one thing after the other is waited for; one that asks nothing is not.
#[test]
fn polls_are_counted_while_a_guest_is_at_work() {
    let mut guest = Guest::new(TestStore::new());
    let polls =
        |guest: &Guest| guest.number("polls_hit_total") + guest.number("polls_missed_total");
    let (hits, all) = (guest.number("polls_hit_total"), polls(&guest));

    until("polls find work", || {
        guest.time(Op::Read, 200, 4096);
        guest.number("polls_hit_total") > hits + 20
    });

    assert!(polls(&guest) > all + 20);
    until("it gives up", || {
        let before = polls(&guest);
        std::thread::sleep(Duration::from_millis(100));
        polls(&guest) == before
    });
}

#[test]
fn requests_that_are_held_are_counted() {
    let test = "numbers_and_limits::requests_that_are_held_are_counted";
    let Some(mount) = Mount::ext4(test, 96 << 20) else { return };
    let mut guest = Guest::new(TestStore::at(mount.path().join("store")));
    guest.run(Op::Write, 0, 64 << 10);
    assert_eq!(guest.number("held"), 0);
    let full = mount.fill(MIB);
    (1..=40).for_each(|i| guest.submit(Op::Write, i * MIB, 512 << 10));

    until("some are held", || guest.number("held") > 1);

    let (held, waiting) = (guest.number("held"), guest.number("in_flight"));
    assert!(held <= waiting && waiting <= 40, "{held} of {waiting}");
    drop(full);
    guest.bench.done(&["disk", "resume", "a"]);
    guest.complete(40);
    until("none is held", || guest.number("held") == 0 && guest.number("in_flight") == 0);
}

#[test]
fn limits_limit_a_guest() {
    const LEN: u32 = 64 << 10;
    let mut guest = Guest::new(TestStore::new());
    let free = guest.time(Op::Write, 64, LEN);

    // A tenth of a second's worth goes at once without a word.
    guest.limit(&["--bps", "8M"]);
    let slow = guest.time(Op::Write, 64, LEN);
    assert!(slow > Duration::from_millis(350), "4 MiB of 8 a second in {slow:?}");

    guest.limit(&["--bps", "8M", "--burst", "1000"]);
    let burst = guest.time(Op::Write, 48, LEN);
    assert!(burst < slow / 2, "3 MiB of 8 that may go at once in {burst:?}, {slow:?} before");
    let after = guest.time(Op::Write, 96, LEN);
    assert!(after > Duration::from_millis(80), "6 MiB when 3 of 8 were used, in {after:?}");

    guest.limit(&["--iops", "200"]);
    let slow = guest.time(Op::Read, 100, 4096);
    assert!(slow > Duration::from_millis(350), "100 of 200 a second in {slow:?}");

    guest.limit(&[]);
    let lifted = guest.time(Op::Write, 64, LEN);
    assert!(lifted < slow / 2, "{lifted:?} without limits; {free:?} before any");
}
