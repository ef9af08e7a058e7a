//! What the host cannot do for a while is held and done later, as on a full host; what it will not
//! do any more is told to the guest.

use offshoot_tests::daemon::Daemon;
use offshoot_tests::served::ServedDisk;
use offshoot_tests::store::TestStore;
use offshoot_tests::trace::{Refused, Tracer};
use offshoot_tests::until;
use serde_json::{Value, json};
use vhost_blk::client::{ClientQueue, Op, Span};

/// How long a request may take that nobody holds, in milliseconds.
const LIMIT_MS: u32 = 20_000;

/// A disk in service.
struct Bench {
    disk: ServedDisk,
    daemon: Daemon,
}

impl Bench {
    fn start() -> Bench {
        let disk = ServedDisk::new(TestStore::new());
        let daemon = disk.daemon();
        disk.attach();
        Bench { disk, daemon }
    }

    /// Has the host refuse writes through the page cache.
    fn refuse(&self, errno: i32) -> Tracer {
        let calls = |call, _: &_| call == libc::SYS_pwritev;
        Tracer::refuse(self.daemon.pid(), Refused { calls, errno, after: 0 })
    }

    fn held(&self) -> Value {
        self.daemon.json("GET", "/v1/stats", &Value::Null)[0]["stats"]["held"].clone()
    }

    fn events(&self) -> Vec<String> {
        let text = String::from_utf8(self.daemon.ask("GET", "/v1/events", b"").body).unwrap();
        let kind = |line| serde_json::from_str::<Value>(line).unwrap()["kind"].clone();
        text.lines().map(|line| kind(line).as_str().unwrap().to_owned()).collect()
    }
}

fn submit(queue: &mut ClientQueue, op: Op<'_>, offset: u64, byte: u8) -> Span {
    let span = Span { offset: queue.data().0, len: 4096 };
    queue.arena().write(span.offset, &[byte; 4096]);
    let spans = if matches!(op, Op::Flush) { &[][..] } else { &[span] };
    queue.submit(op, offset, spans, 0).unwrap();
    queue.kick();
    span
}

fn status(queue: &mut ClientQueue) -> u8 {
    assert!(queue.wait(LIMIT_MS), "it is answered");
    queue.poll().expect("an answer").status
}

/// Story: requests were held for want of space only. A host that had no memory for a moment, or
/// whose network file system was away, failed a guest's writes, after which its file system was
/// read-only until somebody repaired it.
#[test]
fn what_may_pass_is_held_and_what_may_not_is_told() {
    let bench = Bench::start();
    let (client, mut queues) = bench.disk.connect(false);
    let queue = &mut queues[0];
    let passing = [(libc::ENOMEM, "no memory"), (libc::ETIMEDOUT, "does not reach")];
    for (n, (errno, why)) in (1..).zip(passing) {
        let offset = u64::from(n) << 20;
        let refusing = bench.refuse(errno);
        submit(queue, Op::Write, offset, n);
        until("it is held", || !bench.held().is_null());
        let reason = bench.held()["reason"].as_str().unwrap().to_owned();
        assert!(reason.contains(why), "{reason}");
        let health = bench.daemon.json("GET", "/v1/health", &Value::Null);
        assert_eq!(health["held"], json!(["vm"]));
        assert!(!queue.wait(1_500), "it is not answered, also when it was tried again");

        assert!(refusing.refusals() > 1);
        bench.disk.done(&["disk", "resume", "vm"]);

        assert_eq!(status(queue), 0);
        until("it is told", || bench.events().ends_with(&["held".into(), "resumed".into()]));
        let read = submit(queue, Op::Read, offset, 0);
        assert_eq!(status(queue), 0);
        let mut bytes = [0; 4096];
        queue.arena().read(read.offset, &mut bytes);
        assert_eq!(bytes, [n; 4096]);
    }

    let refusing = bench.refuse(libc::EIO);
    submit(queue, Op::Write, 9 << 20, 9);
    assert_eq!(status(queue), 1, "a medium that fails is for the guest to know");
    assert!(bench.held().is_null());
    assert_eq!(refusing.refusals(), 1);
    // The disk goes on.
    submit(queue, Op::Write, 9 << 20, 8);
    assert_eq!(status(queue), 0);
    submit(queue, Op::Flush, 0, 0);
    assert_eq!(status(queue), 0);
    drop((queues, client));
    assert!(bench.daemon.terminate().success());
    bench.disk.done(&["disk", "check", "vm"]);
}
