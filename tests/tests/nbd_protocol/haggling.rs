//! Up to the choice of an export.

use std::io::Write as _;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockd::nbd::ServerOptions;
use blockd::nbd::wire::{Style, command as c, option, reply, transmission as t};
use offshoot_tests::nbd::{Client, PATIENCE, Served, info_request, meta_request};

use super::{Memory, SIZE, STYLES, assert_serves, serve};

#[test]
fn wrong_magic_and_unknown_flags_close_the_connection() {
    let served = serve(Memory::new());
    let mut client = served.client();
    client.send(b"IHAVEOPX\0\0\0\x03\0\0\0\0");
    assert_eq!(client.until_closed(), b"");

    let mut client = Client::connect(&served.socket());
    client.bytes(18);
    client.send(&7u32.to_be_bytes());
    assert_eq!(client.until_closed(), b"");

    for style in STYLES {
        let mut client = served.transmitting("memory", style);
        client.send(&[0x5a; 32]);
        assert_eq!(client.until_closed(), b"", "{style:?}");
    }
    assert_serves(&served);
}

#[test]
fn options_that_make_no_sense_are_refused_and_haggling_goes_on() {
    let served = serve(Memory::new());
    let mut client = served.client();
    for unknown in [0, 4, 12, 4711] {
        assert_eq!(client.outcome(unknown, b"whatever"), reply::ERR_UNSUP);
    }
    for bare in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        assert_eq!(client.outcome(bare, b"x"), reply::ERR_INVALID);
    }
    assert_eq!(client.outcome(option::STARTTLS, &[]), reply::ERR_POLICY);
    let go = info_request("memory", &[3]);
    assert_eq!(client.outcome(option::GO, &go[..go.len() - 1]), reply::ERR_INVALID);
    assert_eq!(client.outcome(option::INFO, &info_request("other", &[])), reply::ERR_UNKNOWN);
    let meta = meta_request("memory", &["base:allocation"]);
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &meta), reply::ERR_INVALID);
    client.agree(Style::Structured);
    let long = [&u32::MAX.to_be_bytes()[..], &[0; 8]].concat();
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &long), reply::ERR_INVALID);
    assert_eq!(client.outcome(option::SET_META_CONTEXT, &meta), reply::ACK);
    client.agree(Style::Extended);
    let structured = client.outcome(option::STRUCTURED_REPLY, &[]);
    assert_eq!(structured, reply::ERR_EXT_HEADER_REQD);

    assert_eq!(client.go("memory").0, SIZE);
}

#[test]
fn an_oversize_option_closes_the_connection() {
    let served = serve(Memory::new());
    for len in [65_537, u32::MAX] {
        let mut client = served.client();
        client.option_header(option::GO, len);
        assert_eq!(client.until_closed(), b"");
    }
    assert_serves(&served);
}

#[test]
fn the_old_way_to_choose_an_export_works() {
    let served = serve(Memory::new());
    for (flags, padding) in [(3u32, 0), (1, 124), (0, 124)] {
        let mut client = Client::connect(&served.socket());
        client.bytes(18);
        client.send(&flags.to_be_bytes());
        client.option_header(option::EXPORT_NAME, 6);
        client.send(b"memory");
        let answer = client.bytes(10 + padding);
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        assert!(answer[10..].iter().all(|&b| b == 0));
        assert_eq!(client.errno((c::READ, 0), (0, 4096), &[]), 0);
    }
    let mut client = served.client();
    client.option_header(option::EXPORT_NAME, 5);
    client.send(b"other");
    assert_eq!(client.until_closed(), b"");
}

#[test]
fn an_abort_is_acknowledged() {
    let served = serve(Memory::new());
    let mut client = served.client();
    assert_eq!(client.outcome(option::ABORT, b"bye"), reply::ACK);
    assert_eq!(client.until_closed(), b"");
}

#[test]
fn transmission_flags_say_what_works() {
    let common = t::HAS_FLAGS | t::SEND_FLUSH | t::SEND_FUA | t::CAN_MULTI_CONN;
    let writes = t::SEND_TRIM | t::SEND_WRITE_ZEROES | t::SEND_FAST_ZERO;
    let read_only = Memory { read_only: true, ..Memory::default() };
    for (export, flags) in
        [(Memory::new(), common | writes), (Arc::new(read_only), common | t::READ_ONLY)]
    {
        let served = serve(export);
        assert_eq!(served.client().go("memory"), (SIZE, flags));
        let mut client = served.client();
        client.agree(Style::Structured);
        assert_eq!(client.go("memory"), (SIZE, flags | t::SEND_DF));
    }
}

#[test]
fn a_handshake_has_a_deadline() {
    let options =
        ServerOptions { handshake_max: Duration::from_millis(300), ..ServerOptions::default() };
    let served = Served::new(vec![Memory::new()], options);
    let mut silent = Client::connect(&served.socket()).greeted();
    let mut slow = served.client();
    let mut trickle = slow.socket.try_clone().unwrap();
    let sender = thread::spawn(move || {
        let header = [&b"IHAVEOPT"[..], &[0, 0, 0, 7, 0, 0, 0x10, 0]].concat();
        for byte in header.iter().cycle() {
            if trickle.write_all(&[*byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    assert_eq!(silent.until_closed(), b"");
    assert_eq!(slow.until_closed(), b"");
    sender.join().unwrap();
    assert_eq!(served.server.status().unfinished, 2);
    // Once through, a client may be silent for as long as it likes.
    let mut idle = served.transmitting("memory", Style::Simple);
    thread::sleep(Duration::from_millis(600));
    assert_eq!(idle.errno((c::READ, 0), (0, 512), &[]), 0);
}

#[test]
fn one_client_too_many_is_told_so() {
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let served = Served::new(vec![Memory::new()], options);
    let first = served.transmitting("memory", Style::Simple);
    let mut second = served.transmitting("memory", Style::Simple);

    let mut third = served.client();
    let replies = third.option(option::GO, &info_request("memory", &[]));

    let (kind, message) = &replies[0];
    assert_eq!(*kind, reply::ERR_POLICY);
    assert_eq!(String::from_utf8_lossy(message), "2 clients are connected, the limit");
    assert_eq!(second.errno((c::READ, 0), (0, 512), &[]), 0);
    assert_eq!(served.server.status().refused, 1);
    drop((first, third));
    let begun = Instant::now();
    while served.server.status().connections.len() > 1 {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    assert_serves(&served);
}
