//! What is data, what is zeroes, and what has changed.

use std::sync::Arc;

use blockd::nbd::wire::{Style, chunk, command as c, option};
use blockd::nbd::{Export, STATE_HOLE, STATE_ZERO, ServerOptions, VolumeExport};
use offshoot_tests::nbd::{Client, Disks, Served, in_service, meta_request};

use super::{EINVAL, MIB, SIZE, serve};

/// A disk with data, explicit zeroes and holes, served as `memory`.
fn mixed() -> (Disks, Served) {
    let disks = Disks::new();
    let disk = disks.disk(1, SIZE / 512, None);
    disk.write(0, 8192, &[1; 4096]).unwrap();
    disk.write(0, MIB, &[2; 65536]).unwrap();
    disk.write_zeroes(0, MIB + 4096, 4096, true).unwrap();
    let served = serve(Arc::new(VolumeExport::new(in_service("memory", disk))));
    (disks, served)
}

#[test]
fn reads_tell_holes_from_data() {
    let (_disks, served) = mixed();
    for style in [Style::Structured, Style::Extended] {
        let mut client = served.transmitting("memory", style);
        client.request((c::READ, 0), 3, (512, MIB + 16384 - 512), &[]);
        let chunks = client.chunks();
        let seen: Vec<(u16, u64, u64, u8)> = chunks
            .iter()
            .map(|chunk| {
                let at = u64::from_be_bytes(chunk.payload[..8].try_into().unwrap());
                let rest = &chunk.payload[8..];
                if chunk.kind == chunk::OFFSET_HOLE {
                    (2, at, u32::from_be_bytes(rest.try_into().unwrap()).into(), 0)
                } else {
                    assert!(rest.iter().all(|b| *b == rest[0]));
                    (chunk.kind, at, rest.len() as u64, rest[0])
                }
            })
            .collect();
        let expected = [
            (2, 512, 7680, 0),
            (1, 8192, 4096, 1),
            (2, 12288, MIB - 12288, 0),
            (1, MIB, 4096, 2),
            (2, MIB + 4096, 4096, 0),
            (1, MIB + 8192, 8192, 2),
        ];
        assert_eq!(seen, expected, "{style:?}");

        client.request((c::READ, c::DF), 4, (0, 16384), &[]);
        let chunks = client.chunks();
        assert_eq!(chunks.len(), 1, "not in fragments");
        assert_eq!(chunks[0].kind, chunk::OFFSET_DATA);
        assert_eq!(chunks[0].payload[8..8 + 8192], [0; 8192]);
        assert_eq!(chunks[0].payload[8 + 8192..8 + 12288], [1; 4096]);
    }
    let mut client = served.transmitting("memory", Style::Simple);
    client.request((c::READ, 0), 9, (4096, 8192), &[]);
    let (cookie, error, data) = client.simple(8192);
    assert_eq!((cookie, error), (9, 0));
    assert!(data[..4096].iter().all(|&b| b == 0) && data[4096..].iter().all(|&b| b == 1));
}

/// The extents of `BLOCK_STATUS` in a chunk of either style.
fn extents(chunk: &offshoot_tests::nbd::Chunk) -> (u32, Vec<(u64, u64)>) {
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let id = number(&chunk.payload[..4]) as u32;
    let (skip, width) = if chunk.kind == chunk::BLOCK_STATUS_EXT { (8, 8) } else { (4, 4) };
    let pairs = chunk.payload[skip..].chunks(2 * width);
    let pairs: Vec<_> = pairs.map(|p| (number(&p[..width]), number(&p[width..]))).collect();
    if skip == 8 {
        assert_eq!(number(&chunk.payload[4..8]), pairs.len() as u64);
    }
    (id, pairs)
}

#[test]
fn block_status_is_the_map() {
    let (_disks, served) = mixed();
    let hole = u64::from(STATE_HOLE | STATE_ZERO);
    for style in [Style::Structured, Style::Extended] {
        let mut client = served.client();
        client.agree(style);
        let meta = meta_request("memory", &["base:allocation", "base:", "other:x", "base:y"]);
        let replies = client.option(option::SET_META_CONTEXT, &meta);
        assert_eq!(replies.len(), 2, "one context: {replies:?}");
        assert_eq!(replies[0].1, [&[0; 4], &b"base:allocation"[..]].concat());
        client.go("memory");

        client.request((c::BLOCK_STATUS, 0), 1, (0, SIZE), &[]);
        let chunks = client.chunks();
        assert_eq!(chunks.len(), 1);
        let expected = [
            (8192, hole),
            (4096, 0),
            (MIB - 12288, hole),
            (4096, 0),
            (4096, hole),
            (65536 - 8192, 0),
            (SIZE - MIB - 65536, hole),
        ];
        assert_eq!(extents(&chunks[0]), (0, expected.to_vec()));

        client.request((c::BLOCK_STATUS, c::REQ_ONE), 2, (512, 4096), &[]);
        assert_eq!(extents(&client.chunks()[0]).1, [(4096, hole)]);
        client.request((c::BLOCK_STATUS, c::REQ_ONE), 2, (8192 + 512, MIB), &[]);
        assert_eq!(extents(&client.chunks()[0]).1, [(3584, 0)]);
        assert_eq!(client.errno((c::BLOCK_STATUS, 0), (0, SIZE + 512), &[]), EINVAL);
        assert_eq!(client.errno((c::BLOCK_STATUS, 0), (0, 0), &[]), EINVAL);
    }
}

/// With extended headers a request may be longer than 4 GiB.
#[test]
fn extended_headers_reach_beyond_four_gib() {
    let disks = Disks::new();
    let size = 20 << 30;
    let disk = disks.disk(1, size / 512, None);
    disk.write(0, 10 << 30, &[1; 4096]).unwrap();
    let served = serve(Arc::new(VolumeExport::new(in_service("memory", disk))));
    let mut client = served.client();
    client.agree(Style::Extended);
    client.option(option::SET_META_CONTEXT, &meta_request("memory", &["base:allocation"]));
    client.go("memory");

    client.request((c::BLOCK_STATUS, 0), 1, (0, size), &[]);
    let seen = extents(&client.chunks()[0]).1;

    assert_eq!(seen, [(10 << 30, 3), (4096, 0), ((10 << 30) - 4096, 3)]);
    assert_eq!(client.errno((c::WRITE_ZEROES, 0), (0, size), &[]), 0);
    client.request((c::BLOCK_STATUS, 0), 1, (0, size), &[]);
    assert_eq!(extents(&client.chunks()[0]).1, [(size, 3)]);
}

/// Contexts count for the export they were selected for, and until the next selection.
#[test]
fn contexts_belong_to_their_export() {
    let disks = Disks::new();
    let exports: Vec<Arc<dyn Export>> = [1, 2]
        .map(|n| {
            Arc::new(VolumeExport::new(in_service(&format!("d{n}"), disks.disk(n, 2048, None))))
        })
        .map(|e| e as Arc<dyn Export>)
        .to_vec();
    let served = Served::new(exports, ServerOptions::default());
    let select = |client: &mut Client, name: &str, queries: &[&str]| {
        client.agree(Style::Structured);
        client.option(option::SET_META_CONTEXT, &meta_request(name, queries));
    };
    let status = |client: &mut Client| client.errno((c::BLOCK_STATUS, 0), (0, 512), &[]);

    let mut client = served.client();
    select(&mut client, "d1", &["base:allocation"]);
    client.go("d2");
    assert_eq!(status(&mut client), EINVAL);

    let mut client = served.client();
    select(&mut client, "d1", &["base:allocation"]);
    select(&mut client, "d1", &[]);
    client.go("d1");
    assert_eq!(status(&mut client), EINVAL);

    let mut client = served.client();
    select(&mut client, "d1", &["base:allocation"]);
    client.go("d1");
    assert_eq!(status(&mut client), 0);
}
