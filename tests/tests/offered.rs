//! What a disk in service offers a front end is what it can do, to the last bit: by kind of disk.

use std::path::Path;

use offshoot_tests::store::TestStore;
use vhost_blk::blk::{
    F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_MQ, F_RO, F_SEG_MAX, F_SIZE_MAX, F_TOPOLOGY,
    F_WRITE_ZEROES,
};
use vhost_blk::client::FrontEnd;
use vhost_blk::proto::{F_PROTOCOL_FEATURES, feature, request};
use vhost_blk::queue::{F_EVENT_IDX, F_INDIRECT_DESC, F_LOG_ALL, F_RING_PACKED, F_VERSION_1};

/// What does not depend on the disk.
const ALWAYS: u64 = F_VERSION_1
    | F_PROTOCOL_FEATURES
    | F_LOG_ALL
    | F_INDIRECT_DESC
    | F_EVENT_IDX
    | F_RING_PACKED
    | F_SEG_MAX
    | F_BLK_SIZE
    | F_TOPOLOGY;
/// What a disk can do that can be written to.
const WRITABLE: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;
const PROTOCOL: u64 = feature::MQ
    | feature::LOG_SHMFD
    | feature::REPLY_ACK
    | feature::BACKEND_REQ
    | feature::CONFIG
    | feature::INFLIGHT_SHMFD
    | feature::RESET_DEVICE
    | feature::CONFIGURE_MEM_SLOTS
    | feature::STATUS
    | feature::DEVICE_STATE;

/// The words of features and of protocol features, as they come over the socket.
fn words(socket: &Path) -> (u64, u64) {
    let mut front = FrontEnd::connect(socket).unwrap();
    let none = &[0u8; 0];
    let features: u64 = front.ask(request::GET_FEATURES, none, &[]).unwrap().0;
    let protocol: u64 = front.ask(request::GET_PROTOCOL_FEATURES, none, &[]).unwrap().0;
    (features, protocol)
}

#[test]
fn features_are_those_of_the_kind_of_disk() {
    let bench = TestStore::new();
    let _daemon = bench.daemon();
    let create = |name: &str| bench.done(&["disk", "create", name, "--size", "64M"]);
    ["many", "one", "asked", "sealed"].into_iter().for_each(|name| _ = create(name));
    bench.done(&["disk", "seal", "sealed"]);
    let cases: [(&str, &[&str], u64); 4] = [
        ("many", &["--queues", "4"], WRITABLE | F_MQ),
        ("one", &[], WRITABLE),
        ("asked", &["--readonly", "--queues", "4"], F_RO | F_MQ),
        ("sealed", &["--readonly"], F_RO),
    ];
    for (name, options, own) in cases {
        let socket = bench.path(&format!("{name}.sock"));
        let attach = ["disk", "attach", name, "--socket", socket.to_str().unwrap()];
        bench.done(&[&attach[..], options].concat());

        let (features, protocol) = words(&socket);

        assert_eq!(features, ALWAYS | own, "{name}: {:#x}", features ^ (ALWAYS | own));
        assert_eq!(protocol, PROTOCOL, "{name}");
        assert_eq!(features & F_SIZE_MAX, 0, "a segment may be as long as a request");
    }
}
