//! A front end that breaks the protocol ends its own session with an error that names the request,
//! or is told no; the process, and the next session, live on.

mod common;
#[path = "common/front_end.rs"]
mod front_end;

use std::os::fd::{AsFd, BorrowedFd};

use common::{Daemon, Rng, capabilities};
use front_end::{MEMORY, USER, addr, bell, memfd, message, random_message, single, start_ring};
use rustix::fs::ftruncate;
use vhost_blk::client::{Client, FrontEnd, Op, Options, Span};
use vhost_blk::proto::{
    self, F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, MemRegion, VringAddr,
    VringState, request,
};
use vhost_blk::queue::{F_LOG_ALL, F_VERSION_1};
use vhost_blk::session::PROTOCOL_FEATURES;
use zerocopy::IntoBytes;

/// A front end that negotiated everything and mapped 1 MiB, but started no ring.
fn negotiated(daemon: &Daemon, acks: bool) -> FrontEnd {
    front_end::negotiated(daemon.path(), acks, memfd(MEMORY).as_fd()).unwrap()
}

/// The daemon still serves an honest client.
fn alive(daemon: &Daemon) {
    let (client, mut queues) = Client::connect(daemon.path(), Options::default()).unwrap();
    let sector = Span { offset: queues[0].data().0, len: 512 };
    assert_eq!(queues[0].run(Op::Read, 0, &[sector], 10_000).unwrap().status, 0);
    drop(client);
    daemon.end().unwrap();
}

/// Sends bytes that no honest front end sends; the session must end and say `reason`.
fn ends_with(daemon: &Daemon, what: &str, bytes: &[u8], fds: &[BorrowedFd<'_>], reason: &str) {
    let mut front = negotiated(daemon, true);
    front.send_raw(bytes, fds).unwrap();
    let end = daemon.end();
    assert!(end.as_ref().is_err_and(|e| e.contains(reason)), "{what}: {end:?}");
}

#[test]
fn malformed_messages_end_the_session_by_name() {
    let daemon = Daemon::new(capabilities(2));
    let d = &daemon;
    let v = FLAG_VERSION;
    let get = request::GET_FEATURES;
    let fd = bell();
    let many = vec![fd.as_fd(); 32];
    ends_with(d, "version 0", &message(get, 0, &[]), &[], "unknown protocol version");
    ends_with(d, "version 2", &message(get, 2, &[]), &[], "unknown protocol version");
    ends_with(d, "a reply", &message(get, v | FLAG_REPLY, &[]), &[], "GET_FEATURES: the front end");
    ends_with(d, "unknown", &message(999, v, &[]), &[], "request 999");
    ends_with(d, "code 0", &message(0, v, &[]), &[], "request 0");
    let mut huge = message(request::SET_FEATURES, v, &[]);
    huge[8..].copy_from_slice(&u32::MAX.to_ne_bytes());
    ends_with(d, "4 GiB of payload", &huge, &[], "longer than any request");
    for code in [request::SET_FEATURES, request::SET_VRING_NUM, request::SET_VRING_ADDR] {
        for len in [0, 7, 9, 41, 4096] {
            let bytes = message(code, v, &vec![0; len]);
            ends_with(d, "wrong length", &bytes, &[], "the wrong length");
        }
    }
    let with_payload = message(get, v, &[0]);
    ends_with(d, "payload of none", &with_payload, &[], "GET_FEATURES: the payload");
    ends_with(d, "fd of none", &message(get, v, &[]), &[fd.as_fd()], "number of descriptors");
    ends_with(d, "no fd", &message(request::ADD_MEM_REG, v, &[0; 40]), &[], "number of desc");
    let table = message(request::SET_MEM_TABLE, v, &[0; 8]);
    ends_with(d, "files of no region", &table, &many, "contradicts the message");
    alive(d);
}

#[test]
fn half_a_message_ends_the_session_when_the_connection_does() {
    let daemon = Daemon::new(capabilities(1));
    for cut in [1, 11, 12, 15] {
        let mut front = negotiated(&daemon, true);
        let bytes = message(request::SET_FEATURES, FLAG_VERSION, &[0; 8]);
        front.send_raw(&bytes[..cut], &[]).unwrap();
        drop(front);
        let end = daemon.end().unwrap_err();
        assert!(end.contains("ended inside a message"), "{end}");
    }
    alive(&daemon);
}

#[test]
fn front_end_that_never_finishes_its_message_does_not_keep_the_daemon() {
    let daemon = Daemon::new(capabilities(1));
    let mut front = negotiated(&daemon, true);
    front.send_raw(&message(request::SET_FEATURES, FLAG_VERSION, &[0; 8])[..5], &[]).unwrap();
    daemon.handle().stop();
    assert_eq!(daemon.end(), Ok(vhost_blk::session::End::Stopped));
}

#[test]
fn message_in_single_bytes_is_a_message() {
    let daemon = Daemon::new(capabilities(1));
    let mut front = negotiated(&daemon, true);
    let flags = FLAG_VERSION | FLAG_NEED_REPLY;
    let last = message(request::SET_STATUS, flags, &3u64.to_ne_bytes());
    for byte in &last {
        front.send_raw(std::slice::from_ref(byte), &[]).unwrap();
    }
    // Its acknowledgement comes first, then the answer to this.
    let error = front.ask::<_, u64>(request::GET_STATUS, &[0u8; 0], &[]).unwrap_err();
    assert!(error.to_string().contains("reply to another request"), "{error}");
    let status: u64 = front.ask(request::GET_STATUS, &[0u8; 0], &[]).unwrap().0;
    assert_eq!(status, 3);
}

type Claim = (&'static str, fn(&mut FrontEnd) -> format::Result<()>);

/// Well-formed requests that cannot be granted.
const CLAIMS: &[Claim] = &[
    ("features never offered", |f| f.tell(request::SET_FEATURES, &(1u64 << 63), &[])),
    ("protocol features never offered", |f| {
        f.tell(request::SET_PROTOCOL_FEATURES, &(PROTOCOL_FEATURES | 1 << 40), &[])
    }),
    ("ring size 0", |f| f.tell(request::SET_VRING_NUM, &VringState { index: 0, num: 0 }, &[])),
    ("ring size 65536", |f| {
        f.tell(request::SET_VRING_NUM, &VringState { index: 0, num: 65536 }, &[])
    }),
    ("ring 2 of 2", |f| f.tell(request::SET_VRING_NUM, &VringState { index: 2, num: 1 }, &[])),
    ("ring 65536", |f| f.tell(request::SET_VRING_NUM, &VringState { index: 65536, num: 1 }, &[])),
    ("ring of 3", |f| {
        f.tell(request::SET_VRING_NUM, &VringState { index: 1, num: 3 }, &[])?;
        f.tell(request::SET_VRING_ADDR, &addr(1, USER + 65536), &[])?;
        f.tell(request::SET_VRING_ENABLE, &VringState { index: 1, num: 1 }, &[])?;
        f.tell(request::SET_VRING_KICK, &1u64, &[bell().as_fd()])
    }),
    ("ring outside memory", |f| {
        f.tell(request::SET_VRING_NUM, &VringState { index: 1, num: 128 }, &[])?;
        f.tell(request::SET_VRING_ADDR, &addr(1, USER + MEMORY - 8192 - 1024), &[])?;
        f.tell(request::SET_VRING_ENABLE, &VringState { index: 1, num: 1 }, &[])?;
        f.tell(request::SET_VRING_KICK, &1u64, &[bell().as_fd()])
    }),
    ("ring at an odd address", |f| {
        f.tell(request::SET_VRING_NUM, &VringState { index: 1, num: 128 }, &[])?;
        f.tell(request::SET_VRING_ADDR, &addr(1, USER + 8), &[])?;
        f.tell(request::SET_VRING_ENABLE, &VringState { index: 1, num: 1 }, &[])?;
        f.tell(request::SET_VRING_KICK, &1u64, &[bell().as_fd()])
    }),
    ("ring flags of the future", |f| {
        f.tell(request::SET_VRING_ADDR, &VringAddr { flags: 2, ..addr(1, USER) }, &[])
    }),
    ("half enabled", |f| f.tell(request::SET_VRING_ENABLE, &VringState { index: 0, num: 2 }, &[])),
    ("kick without a descriptor", |f| f.tell(request::SET_VRING_KICK, &0x100u64, &[])),
    ("kick that says it has none", |f| {
        f.tell(request::SET_VRING_KICK, &0x100u64, &[bell().as_fd()])
    }),
    ("call that says it has one", |f| f.tell(request::SET_VRING_CALL, &0u64, &[])),
    ("position of a running ring", |f| {
        f.tell(request::SET_VRING_BASE, &VringState { index: 0, num: 7 }, &[])
    }),
    ("size of a running ring", |f| {
        f.tell(request::SET_VRING_NUM, &VringState { index: 0, num: 64 }, &[])
    }),
    ("new place for a running ring", |f| {
        f.tell(request::SET_VRING_ADDR, &addr(0, USER + 65536), &[])
    }),
    ("other features while a ring runs", |f| f.tell(request::SET_FEATURES, &F_VERSION_1, &[])),
    ("memory of no bytes", |f| region(f, MemRegion { guest: MEMORY, size: 0, user: 0, offset: 0 })),
    ("memory past its file", |f| {
        region(f, MemRegion { guest: MEMORY, size: 8192, user: 0, offset: 4096 })
    }),
    ("memory that wraps", |f| {
        region(f, MemRegion { guest: u64::MAX - 4095, size: 8192, user: 0, offset: 0 })
    }),
    ("memory over other memory", |f| {
        region(f, MemRegion { guest: MEMORY - 4096, size: 8192, user: 0, offset: 0 })
    }),
    ("memory of an eventfd", |f| {
        let r = MemRegion { guest: MEMORY, size: 4096, user: 0, offset: 0 };
        f.tell(request::ADD_MEM_REG, &single(r), &[bell().as_fd()])
    }),
    ("memory that was never there", |f| {
        let r = MemRegion { guest: 0, size: 4096, user: USER, offset: 0 };
        f.tell(request::REM_MEM_REG, &single(r), &[])
    }),
    ("table with fewer files", |f| {
        let table = [2u32, 0];
        let region = MemRegion { guest: 0, size: 4096, user: 0, offset: 0 };
        let mut bytes = table.as_bytes().to_vec();
        bytes.extend(region.as_bytes());
        bytes.extend(region.as_bytes());
        f.tell(request::SET_MEM_TABLE, &bytes[..], &[memfd(4096).as_fd()])
    }),
    ("capacity to write", |f| config(f, 0, &[1; 8])),
    ("cache mode 2", |f| config(f, 32, &[2])),
    ("cache mode that was not negotiated", |f| config(f, 32, &[1])),
    ("configuration that lies about its length", |f| {
        let head = proto::Config { offset: 32, size: 9, flags: 0 };
        let mut bytes = head.as_bytes().to_vec();
        bytes.push(1);
        f.tell(request::SET_CONFIG, &bytes[..], &[])
    }),
    ("in-flight area while a ring runs", |f| inflight(f, 4096, 2, 128)),
    ("channel that is no socket", |f| {
        f.tell(request::SET_BACKEND_REQ_FD, &[0u8; 0], &[bell().as_fd()])
    }),
    ("status of nine bits", |f| f.tell(request::SET_STATUS, &256u64, &[])),
];

fn region(f: &mut FrontEnd, r: MemRegion) -> format::Result<()> {
    f.tell(request::ADD_MEM_REG, &single(r), &[memfd(8192).as_fd()])
}

fn config(f: &mut FrontEnd, offset: u32, bytes: &[u8]) -> format::Result<()> {
    let size = u32::try_from(bytes.len()).unwrap();
    let mut payload = proto::Config { offset, size, flags: 0 }.as_bytes().to_vec();
    payload.extend(bytes);
    f.tell(request::SET_CONFIG, &payload[..], &[])
}

fn inflight(f: &mut FrontEnd, size: u64, queues: u16, queue_size: u16) -> format::Result<()> {
    let area = proto::Inflight { size, offset: 0, queues, queue_size, padding: 0 };
    f.tell(request::SET_INFLIGHT_FD, &area, &[memfd(size.max(1)).as_fd()])
}

#[test]
fn claims_that_cannot_be_granted_are_refused_and_the_session_goes_on() {
    let daemon = Daemon::new(capabilities(2));
    for (what, claim) in CLAIMS {
        let mut front = negotiated(&daemon, true);
        start_ring(&mut front, USER, bell().as_fd()).unwrap();
        let error = claim(&mut front).expect_err(what);
        assert!(error.to_string().contains("refused"), "{what}: {error}");
        let offered: u64 = front.ask(request::GET_QUEUE_NUM, &[0u8; 0], &[]).expect(what).0;
        assert_eq!(offered, 2, "{what}: the session goes on");
        drop(front);
        daemon.end().expect(what);
    }
    alive(&daemon);
}

#[test]
fn claims_without_acknowledgement_end_the_session() {
    let daemon = Daemon::new(capabilities(2));
    for (what, claim) in CLAIMS {
        let mut front = negotiated(&daemon, false);
        start_ring(&mut front, USER, bell().as_fd()).unwrap();
        // A session that ended may be noticed while the claim is still being sent.
        let _ = claim(&mut front);
        let error = daemon.end().expect_err(what);
        assert!(
            error.contains("cannot serve request S")
                || error.contains("request ADD_MEM_REG")
                || error.contains("request REM_MEM_REG"),
            "{what}: {error}"
        );
    }
    alive(&daemon);
}

#[test]
fn requests_of_features_that_were_not_negotiated_end_the_session() {
    let daemon = Daemon::new(capabilities(1));
    for (code, len, fds) in [
        (request::GET_CONFIG, 20, 0),
        (request::GET_INFLIGHT_FD, 24, 0),
        (request::ADD_MEM_REG, 40, 1),
        (request::GET_STATUS, 0, 0),
        (request::RESET_DEVICE, 0, 0),
        (request::SET_LOG_BASE, 16, 1),
        (request::CHECK_DEVICE_STATE, 0, 0),
    ] {
        let mut front = FrontEnd::connect(daemon.path()).unwrap();
        let fd = bell();
        let bytes = message(code, FLAG_VERSION, &vec![0; len]);
        front.send_raw(&bytes, &[fd.as_fd()][..fds]).unwrap();
        let error = daemon.end().unwrap_err();
        assert!(error.contains("was not negotiated"), "{code}: {error}");
    }
}

#[test]
fn dirty_log_must_cover_the_guest() {
    let daemon = Daemon::new(capabilities(1));
    let mut front = negotiated(&daemon, true);
    let features = F_VERSION_1 | F_PROTOCOL_FEATURES | F_LOG_ALL;
    front.tell(request::SET_FEATURES, &features, &[]).unwrap();
    let log = proto::Log { size: MEMORY / 4096 / 8 - 1, offset: 0 };
    let file = memfd(4096);
    let reply = front.ask::<_, proto::Log>(request::SET_LOG_BASE, &log, &[file.as_fd()]);
    assert!(reply.is_err());
    assert!(daemon.end().unwrap_err().contains("dirty log is too small"));

    let mut front = negotiated(&daemon, true);
    let log = proto::Log { size: MEMORY / 4096 / 8, offset: 0 };
    front.ask::<_, proto::Log>(request::SET_LOG_BASE, &log, &[file.as_fd()]).unwrap();
    let more = MemRegion { guest: MEMORY, size: 4096, user: 1 << 40, offset: 0 };
    assert!(region(&mut front, more).is_err(), "memory past the log");
}

#[test]
fn memory_cut_short_under_a_running_ring_ends_that_session_only() {
    let daemon = Daemon::new(capabilities(1));
    let mut front = negotiated(&daemon, true);
    let file = memfd(MEMORY);
    let more = MemRegion { guest: MEMORY, size: MEMORY, user: 1 << 40, offset: 0 };
    front.tell(request::ADD_MEM_REG, &single(more), &[file.as_fd()]).unwrap();
    let kick = bell();
    start_ring(&mut front, 1 << 40, kick.as_fd()).unwrap();
    ftruncate(&file, 0).unwrap();
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    let error = daemon.end().unwrap_err();
    assert!(error.contains("truncated its shared memory"), "{error}");
    alive(&daemon);
}

#[test]
fn random_messages_never_stop_the_daemon() {
    let mut rng = Rng(common::seed("message fuzzer"));
    let daemon = Daemon::new(capabilities(2));
    for round in 0..300 {
        let mut front = match round % 3 {
            0 => FrontEnd::connect(daemon.path()).unwrap(),
            _ => negotiated(&daemon, true),
        };
        if round % 3 == 2 {
            start_ring(&mut front, USER, bell().as_fd()).unwrap();
        }
        for _ in 0..40 {
            let (bytes, fds) = random_message(&mut || rng.next());
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            if front.send_raw(&bytes, &fds).is_err() {
                break;
            }
        }
        drop(front);
        // However it ended, it ended: no ring runs and no thread hangs.
        let _ = daemon.end();
    }
    alive(&daemon);
}
