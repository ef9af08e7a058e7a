//! Front ends that break the protocol, and clients of NBD that do.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use offshoot_tests::nbd;
use rustix::fs::ftruncate;
use vhost_blk::client::{Client, FrontEnd, Op, Span};
use vhost_blk::proto::{FLAG_VERSION, request};

use super::liar::{MEMORY, USER, bell, memfd, message, negotiated, random_message, start_ring};
use super::{Target, options};

/// An attack that is turned away at the door tries nothing.
fn most_got_in(got_in: u64, tried: u64) {
    assert!(got_in * 2 > tried, "{got_in} of {tried} attacks got in");
}

/// Messages with random content, to sessions in all states.
pub fn random_messages(target: &mut Target) {
    let shared = memfd(MEMORY);
    let (mut got_in, tried) = (0, target.rounds * 400);
    for round in 0..tried {
        // A session that a while ago has not ended may still have its place.
        let front = match round % 3 {
            0 => FrontEnd::connect(&target.vhost),
            _ => negotiated(&target.vhost, true, shared.as_fd()),
        };
        let Ok(mut front) = front else { continue };
        got_in += 1;
        if round % 3 == 2 {
            let _ = start_ring(&mut front, USER, bell().as_fd());
        }
        for _ in 0..40 {
            let (bytes, fds) = random_message(&mut || target.rng.any());
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            if front.send_raw(&bytes, &fds).is_err() {
                break;
            }
        }
    }
    most_got_in(got_in, tried);
}

/// Messages that end too early, say that they are longer than they are, or never end.
pub fn torn_messages(target: &mut Target) {
    let shared = memfd(MEMORY);
    let whole = message(request::SET_FEATURES, FLAG_VERSION, &[0; 8]);
    let mut waiting = Vec::new();
    let (mut got_in, tried) = (0, target.rounds * 300);
    for round in 0..tried {
        let Ok(mut front) = negotiated(&target.vhost, true, shared.as_fd()) else { continue };
        got_in += 1;
        let cut = usize::try_from(target.rng.below(whole.len() as u64)).unwrap();
        let mut bytes = whole[..cut].to_vec();
        if round % 4 == 0 && cut == 12 {
            bytes[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        }
        let _ = front.send_raw(&bytes, &[]);
        if round % 16 == 0 {
            waiting.push(front);
        }
        if waiting.len() == 3 {
            waiting.clear();
        }
    }
    most_got_in(got_in, tried);
}

/// Descriptors that are not what they are sent as.
pub fn wrong_descriptors(target: &mut Target) {
    let dir = tempfile::tempdir().unwrap();
    let file = File::create_new(dir.path().join("file")).unwrap();
    let (left, right) = UnixStream::pair().unwrap();
    (&left).write_all(&[1; 4096]).unwrap();
    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    let wrong: Vec<OwnedFd> = vec![
        // Readable for ever: a doorbell that never stops ringing.
        File::open("/dev/zero").unwrap().into(),
        File::options().write(true).open("/dev/full").unwrap().into(),
        File::open(dir.path()).unwrap().into(),
        file.into(),
        right.into(),
        left.into(),
        read_end,
        write_end,
        memfd(0),
        memfd(4096),
        bell(),
    ];
    let shared = memfd(MEMORY);
    let (mut got_in, times) = (0, target.rounds * 10);
    for _ in 0..times {
        for fd in &wrong {
            let fd = fd.as_fd();
            // As memory, as doorbells of a ring that runs, and for everything else.
            drop(negotiated(&target.vhost, true, fd));
            let Ok(mut front) = negotiated(&target.vhost, true, shared.as_fd()) else { continue };
            got_in += 1;
            let _ = start_ring(&mut front, USER, fd);
            for code in [
                request::SET_VRING_CALL,
                request::SET_VRING_ERR,
                request::SET_BACKEND_REQ_FD,
                request::SET_LOG_FD,
            ] {
                let _ = front.tell(code, &0u64, &[fd]);
            }
            let area = [4096u64, 0, 1 | 128 << 16];
            let _ = front.tell(request::SET_INFLIGHT_FD, &area, &[fd]);
            let _ = front.send_raw(&message(request::SET_LOG_BASE, FLAG_VERSION, &[1; 16]), &[fd]);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    most_got_in(got_in, times * wrong.len() as u64);
}

/// Memory that is gone while a ring in it runs.
pub fn cut_memory(target: &mut Target) {
    let (mut got_in, tried) = (0, target.rounds * 60);
    for _ in 0..tried {
        let shared = memfd(MEMORY);
        let Ok(mut front) = negotiated(&target.vhost, true, shared.as_fd()) else { continue };
        let kick = bell();
        let started = start_ring(&mut front, USER, kick.as_fd());
        ftruncate(&shared, target.rng.below(3) * 4096).unwrap();
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        if started.is_ok() {
            got_in += 1;
            let gone = front.ask::<_, u64>(request::GET_QUEUE_NUM, &[0u8; 0], &[]);
            // Told either way: the answer, or the end of the session.
            drop(gone);
        }
    }
    most_got_in(got_in, tried);
}

/// More front ends than may be connected, some that stay and say nothing, and many that only look.
pub fn crowd(target: &mut Target) {
    for _ in 0..target.rounds * 5 {
        let idle: Vec<_> =
            (0..20).filter_map(|_| UnixStream::connect(&target.vhost).ok()).collect();
        for _ in 0..400 {
            let _ = UnixStream::connect(&target.vhost);
        }
        drop(idle);
        // As soon as those are gone there is room again.
        let mut connected = None;
        super::until("there is room", || {
            connected = Client::connect(&target.vhost, options(1)).ok();
            connected.is_some()
        });
        let (_client, mut queues) = connected.unwrap();
        let sector = Span { offset: queues[0].data().0, len: 512 };
        assert_eq!(queues[0].run(Op::Read, 0, &[sector], 20_000).unwrap().status, 0);
    }
}

/// Bytes that are no NBD, before and after the handshake.
pub fn nbd_garbage(target: &mut Target) {
    for round in 0..target.rounds * 300 {
        let bytes: Vec<u8> = (0..1000).flat_map(|_| target.rng.any().to_le_bytes()).collect();
        let mut socket = match round % 3 {
            0 => UnixStream::connect(&target.nbd).unwrap(),
            1 => nbd::Client::connect(&target.nbd).greeted().socket,
            _ => {
                let mut client = nbd::Client::connect(&target.nbd).greeted();
                client.go("a");
                client.socket
            }
        };
        // The server closes it somewhere in between.
        let _ = socket.write_all(&bytes);
    }
}
