//! Who a machine is: made anew for each, before its first instruction.

use format::{Context as _, Result};
use rustix::rand::{GetRandomFlags, getrandom};
use uuid::Uuid;

use crate::wires::Identity;

/// A new identity for the machine called `name` with identity `id`.
///
/// # Errors
/// When the host has no random numbers: then there is no new machine, rather than one that shares
/// its secrets with another.
pub fn fresh(name: &str, id: Uuid) -> Result<Identity> {
    let mut random = [0; 16 + 32 + 5];
    fill(&mut random).context("make", || format!("the identity of vm {name}"))?;
    let (generation, rest) = random.split_at(16);
    let (seed, address) = rest.split_at(32);
    let mut identity = Identity {
        name: name.to_owned(),
        id,
        generation_id: [0; 16],
        seed: [0; 32],
        // Locally administered, and of one station.
        mac: [0x02, 0, 0, 0, 0, 0],
    };
    identity.generation_id.copy_from_slice(generation);
    identity.seed.copy_from_slice(seed);
    identity.mac[1..].copy_from_slice(address);
    Ok(identity)
}

fn fill(buf: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        done +=
            getrandom(&mut buf[done..], GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_the_same() {
        let made: Vec<Identity> = (0..1000).map(|_| fresh("a", Uuid::nil()).unwrap()).collect();
        let different = |of: fn(&Identity) -> Vec<u8>| {
            made.iter().map(of).collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!(different(|i| i.generation_id.to_vec()), made.len());
        assert_eq!(different(|i| i.seed.to_vec()), made.len());
        assert_eq!(different(|i| i.mac.to_vec()), made.len());
        assert!(made.iter().all(|i| i.mac[0] == 0x02));
    }
}
