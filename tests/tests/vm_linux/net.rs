//! Linux with a network card.

use std::time::Instant;

use offshoot_tests::skip;

use crate::machine::{Machines, in_a_lab};

/// A stock kernel's driver brings its card up and the host answers. Its child is on an interface
/// of its own: its driver sees the link go down, and come up when the agent has acknowledged, and
/// it talks with an address of its own, while the parent goes on.
#[test]
fn a_stock_kernel_and_its_child_reach_the_host() {
    let test = "a_stock_kernel_and_its_child_reach_the_host";
    in_a_lab(test, |vms| {
        let start = Instant::now();
        let said = |what: &str| println!("{:5.1} s: {what}", start.elapsed().as_secs_f64());
        let make = |vms: &mut Machines, i: u8| {
            vms.lab.try_run(&format!(
                "modprobe tun; ip tuntap add dev t{i} mode tap && \
                 ip addr add 10.7.{i}.1/24 dev t{i} && ip link set t{i} up"
            ))
        };
        if let (1.., why) = make(vms, 0) {
            return skip(test, &format!("the lab has no tap interfaces: {why}"));
        }
        make(vms, 1);
        vms.run_with("parent", "--net tap=t0");
        if let (1.., why) = vms.try_ask("parent", "modprobe virtio_net && ip link show eth0") {
            return skip(test, &format!("the kernel has no driver for the card: {why}"));
        }
        said("the driver is there");
        vms.ask("parent", "lab_agent /dev/vdb >/run/agent 2>&1 &");
        vms.ask("parent", "ip addr add 10.7.0.2/24 dev eth0 && ip link set eth0 up");
        vms.ask("parent", "ping -c 3 -w 60 10.7.0.1");
        vms.lab.run("ping -c 3 -w 60 10.7.0.2");
        assert_eq!(vms.ask("parent", "cat /sys/class/net/eth0/carrier").trim(), "1");
        assert_eq!(vms.ask("parent", "cat /sys/class/net/eth0/address").trim(), mac(vms, "parent"));
        said("both reach each other");

        vms.ask("parent", "cat /sys/class/net/eth0/carrier_down_count >/run/downs");
        vms.fork("parent", &["child", "--net", "tap=t1"]);
        let up = "until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done";
        vms.ask("child", up);
        let downs = "/sys/class/net/eth0/carrier_down_count";
        vms.ask("child", &format!("[ $(cat {downs}) -gt $(cat /run/downs) ]"));
        assert_eq!(vms.show("child")["net"]["status"]["link"], "up");
        let own = mac(vms, "child");
        vms.ask("child", &format!("ip link set eth0 down && ip link set eth0 address {own}"));
        let address = "ip addr flush dev eth0 && ip addr add 10.7.1.2/24 dev eth0";
        vms.ask("child", &format!("{address} && ip link set eth0 up"));
        vms.ask("child", "ping -c 3 -w 60 10.7.1.1");
        said("the child reaches the host as another station");
        assert_eq!(
            vms.ask("parent", &format!("cat {downs} /run/downs | uniq | wc -l")).trim(),
            "1"
        );
        vms.ask("parent", "ping -c 3 -w 60 10.7.0.1");
        let seen = vms.lab.run("ip neigh show dev t1");
        assert!(seen.contains(&own), "{own}: {seen}");
    });
}

fn mac(vms: &mut Machines, name: &str) -> String {
    vms.show(name)["mac"].as_str().expect("an address").to_owned()
}
