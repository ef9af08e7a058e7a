//! What was measured, as rows of a table, and in the end as graphs and as a list of aims missed.

use std::path::Path;

use super::load::Outcome;
use super::svg::{self, Bar, Line};

/// Rounds of two servers that took turns: ours and the peer's.
pub type Rounds = Vec<(Outcome, Outcome)>;

/// What a job is to reach, next to the peer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Aim {
    /// Least ratio of requests in a second.
    pub iops: Option<f64>,
    /// Largest ratio of processor time for a request.
    pub cpu: Option<f64>,
}

/// All results of a run.
#[derive(Default)]
pub struct Report {
    bars: Vec<Bar>,
    missed: Vec<String>,
    /// Chain depths with processor time for a read: ours, and the peer's as far as it was measured.
    depths: Vec<(String, f64, Option<f64>)>,
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The middle of what `pick` makes of the rounds.
fn middle<T>(rounds: &[T], pick: &dyn Fn(&T) -> f64) -> f64 {
    median(&mut rounds.iter().map(pick).collect::<Vec<_>>())
}

/// Begins a table.
pub fn head(title: &str, about: &str, peer: &str) {
    println!("\n### {title}\n");
    if !about.is_empty() {
        println!("{about}\n");
    }
    println!(
        "| job | ours, IOPS | {peer}, IOPS | ratio [spread] | aim | ours p50/p99 µs \
         | {peer} p50/p99 µs | ours CPU µs/IO | {peer} CPU µs/IO | CPU ratio | aim |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
}

/// What a job gave next to what `host`, rounds of the same requests without any server, gave at
/// most.
pub fn limit(name: &str, rounds: &Rounds, mut host: Vec<f64>) -> String {
    let share = |pick: &dyn Fn(&(Outcome, Outcome)) -> f64| {
        median(&mut rounds.iter().zip(&host).map(|(r, host)| pick(r) / host).collect::<Vec<_>>())
    };
    let (ours, peer) = (share(&|r| r.0.iops), share(&|r| r.1.iops));
    let host = median(&mut host);
    format!("{name}: {host:.0} IOPS, of which ours gives {ours:.2} and the peer {peer:.2}")
}

/// Prints what the host can do at most.
pub fn limits(limits: &[String]) {
    if limits.is_empty() {
        return;
    }
    println!(
        "\nThe same requests without any server, by one thread for each queue straight to the raw \
         file, in the same rounds:\n"
    );
    limits.iter().for_each(|text| println!("- {text}"));
}

impl Report {
    /// Prints a row, and keeps its ratio for the graph. `group` says there what the table's title
    /// says here.
    pub fn row(&mut self, group: &str, name: &str, rounds: &Rounds, aim: Aim) {
        let name_here = if group.is_empty() { name.to_owned() } else { format!("{name}, {group}") };
        let (at, spread) = self.line(&name_here, name, rounds, aim);
        self.bars.push(Bar { name: name_here, at, spread, aim: aim.iops });
    }

    /// Prints a row; gives the ratio and its spread.
    fn line(
        &mut self,
        name_here: &str,
        name: &str,
        rounds: &Rounds,
        aim: Aim,
    ) -> (f64, (f64, f64)) {
        let of = |pick: &dyn Fn(&(Outcome, Outcome)) -> f64| middle(rounds, pick);
        let mut ratios: Vec<f64> = rounds.iter().map(|(o, p)| o.iops / p.iops).collect();
        let ratio = median(&mut ratios);
        let spread = (ratios[0], ratios[ratios.len() - 1]);
        let cpu = of(&|r| r.0.cpu_us / r.1.cpu_us);
        let mut told = |what, value: f64, aim: Option<f64>, met: bool| match aim {
            None => "–".to_owned(),
            Some(aim) if met => format!("{aim:.2} met"),
            Some(aim) => {
                self.missed.push(format!("{name_here}: {what} {value:.2}, aim {aim:.2}"));
                format!("**{aim:.2} missed**")
            }
        };
        let iops_aim = told("IOPS ratio", ratio, aim.iops, aim.iops.is_none_or(|a| ratio >= a));
        let cpu_aim = told("CPU ratio", cpu, aim.cpu, aim.cpu.is_none_or(|a| cpu <= a));
        println!(
            "| {name} | {:.0} | {:.0} | **{ratio:.2}** [{:.2}–{:.2}] | {iops_aim} | {:.0}/{:.0} \
             | {:.0}/{:.0} | {:.1} | {:.1} | {cpu:.2} | {cpu_aim} |",
            of(&|r| r.0.iops),
            of(&|r| r.1.iops),
            spread.0,
            spread.1,
            of(&|r| r.0.p50_us),
            of(&|r| r.0.p99_us),
            of(&|r| r.1.p50_us),
            of(&|r| r.1.p99_us),
            of(&|r| r.0.cpu_us),
            of(&|r| r.1.cpu_us),
        );
        (ratio, spread)
    }

    /// Prints what one depth of a chain gave, and keeps the processor time for the graph. The peer
    /// may be missing.
    pub fn depth(&mut self, depth: u64, ours: Vec<Outcome>, peer: Option<Vec<Outcome>>) {
        let cpu = |rounds: &[Outcome]| middle(rounds, &|o| o.cpu_us);
        self.depths.push((depth.to_string(), cpu(&ours), peer.as_deref().map(cpu)));
        let name = format!("{depth} layers");
        if let Some(peer) = peer {
            let rounds = ours.into_iter().zip(peer).collect();
            self.line(&name, &name, &rounds, Aim::default());
            return;
        }
        println!(
            "| {name} | {:.0} | – | – | – | {:.0}/{:.0} | – | {:.1} | – | – | – |",
            middle(&ours, &|o| o.iops),
            middle(&ours, &|o| o.p50_us),
            middle(&ours, &|o| o.p99_us),
            cpu(&ours),
        );
    }

    /// Says how the processor time of a read grows from the shortest to the longest chain.
    fn growth(&mut self) {
        let ([(first, from, _), .., (last, to, _)], aim) = (&self.depths[..], 1.05) else { return };
        let value = to / from;
        println!(
            "\nOurs takes {value:.2} times the processor time at {last} layers as at {first}."
        );
        if value > aim {
            let text = format!(
                "reads at {last} layers: {value:.2} times the CPU of {first}, aim {aim:.2}"
            );
            self.missed.push(text);
        }
    }

    /// Prints what is left to say, and writes the graphs to `graphs`.
    pub fn finish(&mut self, graphs: Option<&Path>) {
        self.growth();
        self.aims();
        let Some(dir) = graphs else { return };
        let put = |name: &str, text: &str, svg: String| {
            std::fs::write(dir.join(name), svg).expect("the folder of results can be written");
            println!("\n![{text}]({name})");
        };
        let title = "Requests in a second, ours next to qemu-storage-daemon (ratio)";
        if !self.bars.is_empty() {
            put("vhost_user-ratios.svg", title, svg::ratios(title, &self.bars));
        }
        if self.depths.is_empty() {
            return;
        }
        let places: Vec<String> = self.depths.iter().map(|(place, ..)| place.clone()).collect();
        let ours = self.depths.iter().map(|(_, ours, _)| *ours).collect();
        let peer = self.depths.iter().map_while(|(.., peer)| *peer).collect();
        let lines = [
            Line { name: "ours".into(), values: ours },
            Line { name: "qsd qcow2".into(), values: peer },
        ];
        let title = "Processor time of a 4 KiB read in µs, by depth of the chain";
        put("depth.svg", title, svg::lines(title, &places, &lines));
    }

    fn aims(&self) {
        println!("\n### Aims\n");
        match &self.missed[..] {
            [] => println!("All aims in the tables above were met."),
            missed => {
                println!("Missed:\n");
                missed.iter().for_each(|text| println!("- {text}"));
            }
        }
    }
}
