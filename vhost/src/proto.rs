//! The vhost-user protocol on the wire: message numbers, flags, payloads.
//!
//! All numbers are in the byte order of the host; both sides run on one machine. Payload types are
//! plain data: any bytes of the right length decode, and who uses a value checks it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 12;
/// Most payload bytes that a message may have.
pub const PAYLOAD_MAX: usize = 4096;
/// Most descriptors that may come with a message.
pub const FDS_MAX: usize = 32;

/// Header flags: protocol version in the two low bits.
pub const FLAG_VERSION: u32 = 1;
/// Header flag: this is a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Header flag: the sender wants to know whether the request worked.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Virtio feature bit by which protocol features become available.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Payload bit of the vring descriptor messages: no descriptor comes with this one.
pub const VRING_NOFD: u64 = 1 << 8;
/// Flag of SET_VRING_ADDR: writes to the used ring are logged.
pub const VRING_F_LOG: u32 = 1;

/// Protocol feature bits.
pub mod feature {
    #![allow(missing_docs)] // the names are those of the specification
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// Requests of the front end.
pub mod request {
    #![allow(missing_docs)] // the names are those of the specification
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Request of the back end: the configuration space changed.
pub const BACKEND_CONFIG_CHANGE: u32 = 2;

/// Message header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Request number.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Bytes of payload.
    pub size: u32,
}

/// State of one ring: its number and a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    /// Ring number.
    pub index: u32,
    /// Size, position, or enabled; depends on the request.
    pub num: u32,
}

/// Addresses of one ring, in the front end's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddr {
    /// Ring number.
    pub index: u32,
    /// [`VRING_F_LOG`] or 0.
    pub flags: u32,
    /// Descriptors.
    pub desc: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
    /// Available ring, or driver event suppression.
    pub avail: u64,
    /// Guest address that stands for the used ring in the dirty log.
    pub log: u64,
}

/// One memory region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemRegion {
    /// Guest-physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front end.
    pub user: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// Head of the memory table; the regions follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemTable {
    /// Number of regions.
    pub regions: u32,
    /// 0.
    pub padding: u32,
}

/// One memory region to add or remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SingleMemRegion {
    /// 0.
    pub padding: u64,
    /// The region.
    pub region: MemRegion,
}

/// The dirty log area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Log {
    /// Bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// Head of a configuration space access; the bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// First byte.
    pub offset: u32,
    /// Number of bytes.
    pub size: u32,
    /// 0 for the driver's writes, 1 for a migration.
    pub flags: u32,
}

/// The in-flight area. Front ends send it with or without the four bytes of padding that their
/// compiler puts behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inflight {
    /// Bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Number of queues.
    pub queues: u16,
    /// Descriptors per queue.
    pub queue_size: u16,
    /// Padding.
    pub padding: u32,
}

/// Bytes of [`Inflight`] without its padding.
pub const INFLIGHT_SHORT: usize = 20;

/// Start of a device state transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceState {
    /// 0 saves, 1 loads.
    pub direction: u32,
    /// 0: the device is stopped.
    pub phase: u32,
}

/// What a request looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Name in the specification, for error messages.
    pub(crate) name: &'static str,
    /// Fewest and most payload bytes.
    pub(crate) payload: (usize, usize),
    /// Fewest and most descriptors.
    pub(crate) fds: (usize, usize),
    /// Protocol feature that must be negotiated, or 0.
    pub(crate) needs: u64,
    /// Whether the request has a reply of its own.
    pub(crate) replies: bool,
}

/// The shape of a request that this back end understands.
pub(crate) fn shape(code: u32) -> Option<Shape> {
    use feature as f;
    let state = size_of::<VringState>();
    let config = (size_of::<Config>() + 1, PAYLOAD_MAX);
    let single = size_of::<SingleMemRegion>();
    let inflight = (INFLIGHT_SHORT, size_of::<Inflight>());
    let (name, payload, fds, needs, replies) = match code {
        request::GET_FEATURES => ("GET_FEATURES", (0, 0), (0, 0), 0, true),
        request::SET_FEATURES => ("SET_FEATURES", (8, 8), (0, 0), 0, false),
        request::SET_OWNER => ("SET_OWNER", (0, 0), (0, 0), 0, false),
        request::RESET_OWNER => ("RESET_OWNER", (0, 0), (0, 0), 0, false),
        request::SET_MEM_TABLE => ("SET_MEM_TABLE", (8, PAYLOAD_MAX), (0, FDS_MAX), 0, false),
        request::SET_LOG_BASE => {
            ("SET_LOG_BASE", (size_of::<Log>(), size_of::<Log>()), (1, 1), f::LOG_SHMFD, true)
        }
        request::SET_LOG_FD => ("SET_LOG_FD", (0, 8), (1, 1), 0, false),
        request::SET_VRING_NUM => ("SET_VRING_NUM", (state, state), (0, 0), 0, false),
        request::SET_VRING_ADDR => ("SET_VRING_ADDR", (40, 40), (0, 0), 0, false),
        request::SET_VRING_BASE => ("SET_VRING_BASE", (state, state), (0, 0), 0, false),
        request::GET_VRING_BASE => ("GET_VRING_BASE", (state, state), (0, 0), 0, true),
        request::SET_VRING_KICK => ("SET_VRING_KICK", (8, 8), (0, 1), 0, false),
        request::SET_VRING_CALL => ("SET_VRING_CALL", (8, 8), (0, 1), 0, false),
        request::SET_VRING_ERR => ("SET_VRING_ERR", (8, 8), (0, 1), 0, false),
        request::GET_PROTOCOL_FEATURES => ("GET_PROTOCOL_FEATURES", (0, 0), (0, 0), 0, true),
        request::SET_PROTOCOL_FEATURES => ("SET_PROTOCOL_FEATURES", (8, 8), (0, 0), 0, false),
        request::GET_QUEUE_NUM => ("GET_QUEUE_NUM", (0, 0), (0, 0), 0, true),
        request::SET_VRING_ENABLE => ("SET_VRING_ENABLE", (state, state), (0, 0), 0, false),
        request::SET_BACKEND_REQ_FD => {
            ("SET_BACKEND_REQ_FD", (0, 8), (1, 1), f::BACKEND_REQ, false)
        }
        request::GET_CONFIG => ("GET_CONFIG", config, (0, 0), f::CONFIG, true),
        request::SET_CONFIG => ("SET_CONFIG", config, (0, 0), f::CONFIG, false),
        request::GET_INFLIGHT_FD => ("GET_INFLIGHT_FD", inflight, (0, 0), f::INFLIGHT_SHMFD, true),
        request::SET_INFLIGHT_FD => ("SET_INFLIGHT_FD", inflight, (1, 1), f::INFLIGHT_SHMFD, false),
        request::RESET_DEVICE => ("RESET_DEVICE", (0, 0), (0, 0), f::RESET_DEVICE, false),
        request::GET_MAX_MEM_SLOTS => {
            ("GET_MAX_MEM_SLOTS", (0, 0), (0, 0), f::CONFIGURE_MEM_SLOTS, true)
        }
        request::ADD_MEM_REG => {
            ("ADD_MEM_REG", (single, single), (1, 1), f::CONFIGURE_MEM_SLOTS, false)
        }
        // Some front ends attach the file here too; it is closed unused.
        request::REM_MEM_REG => {
            ("REM_MEM_REG", (single, single), (0, 1), f::CONFIGURE_MEM_SLOTS, false)
        }
        request::SET_STATUS => ("SET_STATUS", (8, 8), (0, 0), f::STATUS, false),
        request::GET_STATUS => ("GET_STATUS", (0, 0), (0, 0), f::STATUS, true),
        request::SET_DEVICE_STATE_FD => {
            ("SET_DEVICE_STATE_FD", (8, 8), (1, 1), f::DEVICE_STATE, true)
        }
        request::CHECK_DEVICE_STATE => {
            ("CHECK_DEVICE_STATE", (0, 0), (0, 0), f::DEVICE_STATE, true)
        }
        _ => return None,
    };
    Some(Shape { name, payload, fds, needs, replies })
}
