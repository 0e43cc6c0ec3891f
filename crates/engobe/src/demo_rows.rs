//! The demo's skill: an English sentence about an order becomes one strict JSON object.
//!
//! Rows are drawn from sentence patterns and word lists by a generator that depends on the seed alone; no sentence
//! occurs twice, so the held-out rows were never seen. A model must learn the keys and their order, numbers for
//! number words, singulars for plurals, and `null` for what the sentence leaves out.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::collections::HashSet;

/// What is asked, and the one right answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DemoRow {
    /// the instruction and the sentence
    pub prompt: String,
    /// the JSON object
    pub completion: String,
}

impl DemoRow {
    /// As a line of a prompt/completion file.
    pub fn to_json(&self) -> Value {
        json!({ "prompt": self.prompt, "completion": self.completion })
    }
}

/// singular, plural
const ITEMS: [(&str, &str); 28] = [
    ("apron", "aprons"),
    ("backpack", "backpacks"),
    ("basket", "baskets"),
    ("blanket", "blankets"),
    ("bowl", "bowls"),
    ("brush", "brushes"),
    ("candle", "candles"),
    ("chair", "chairs"),
    ("clock", "clocks"),
    ("cup", "cups"),
    ("cushion", "cushions"),
    ("desk", "desks"),
    ("glass", "glasses"),
    ("hat", "hats"),
    ("jacket", "jackets"),
    ("knife", "knives"),
    ("lamp", "lamps"),
    ("mirror", "mirrors"),
    ("mug", "mugs"),
    ("notebook", "notebooks"),
    ("pillow", "pillows"),
    ("plate", "plates"),
    ("scarf", "scarves"),
    ("shelf", "shelves"),
    ("teapot", "teapots"),
    ("towel", "towels"),
    ("umbrella", "umbrellas"),
    ("vase", "vases"),
];
const COLORS: [&str; 10] =
    ["red", "blue", "green", "black", "white", "yellow", "brown", "grey", "orange", "purple"];
const NUMBERS: [&str; 12] =
    ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];
const CITIES: [&str; 24] = [
    "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Geneva", "Hamburg", "Lima", "Lisbon",
    "London", "Madrid", "Milan", "Montreal", "Oslo", "Paris", "Prague", "Rome", "Seattle", "Seoul", "Sydney",
    "Tokyo", "Toronto", "Vienna",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// `{goods}` is what is ordered, `{to}` a place or nothing, `{by}` a day or nothing.
const PATTERNS: [&str; 12] = [
    "I'd like {goods}{to}{by}, please.",
    "Please send {goods}{to}{by}.",
    "Can you ship {goods}{to}{by}?",
    "We need {goods}{to}{by}.",
    "Could I order {goods}{to}{by}?",
    "Hello, I want to buy {goods}{to}{by}. Thank you!",
    "My office is looking for {goods}{to}{by}.",
    "Put me down for {goods}{to}{by}.",
    "One more order from us: {goods}{to}{by}.",
    "Hi there! Is it possible to get {goods}{to}{by}?",
    "Add {goods} to my order{to}{by}.",
    "We ran out again, so {goods}{to}{by} would be great.",
];
const PLACES: [&str; 4] = [" to {}", " delivered to {}", " for our shop in {}", " at our {} address"];
const DEADLINES: [&str; 4] = [" by {}", " on {}", " before {}", " no later than {}"];

const INSTRUCTION: &str = "Order as JSON: ";

/// Rows for training, validation and the final test: all sentences differ.
pub fn demo_rows(seed: u64, counts: [usize; 3]) -> [Vec<DemoRow>; 3] {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut seen = HashSet::new();
    counts.map(|n| {
        let mut rows = Vec::with_capacity(n);
        while rows.len() < n {
            let row = draw(&mut rng);
            if seen.insert(row.prompt.clone()) {
                rows.push(row);
            }
        }
        rows
    })
}

fn draw(rng: &mut ChaCha8Rng) -> DemoRow {
    let (first, item) = goods(rng);
    let mut items = vec![item];
    let mut text = first;
    if rng.random_bool(0.3) {
        let (second, item) = goods(rng);
        text = format!("{text} and {second}");
        items.push(item);
    }
    let (to, city) = detail(rng, &PLACES, &CITIES);
    let (by, day) = detail(rng, &DEADLINES, &DAYS);
    let pattern = choose(rng, &PATTERNS);
    let sentence = pattern.replace("{goods}", &text).replace("{to}", &to).replace("{by}", &by);
    let answer = json!({ "items": items, "city": city, "day": day });
    DemoRow { prompt: format!("{INSTRUCTION}{sentence}"), completion: answer.to_string() }
}

/// Some number of one thing, perhaps in a colour: as words, and as JSON.
fn goods(rng: &mut ChaCha8Rng) -> (String, Value) {
    let (singular, plural) = *choose(rng, &ITEMS);
    let quantity = rng.random_range(1..=NUMBERS.len());
    let color = rng.random_bool(0.6).then(|| *choose(rng, &COLORS));
    let name = if quantity == 1 { singular } else { plural };
    let described = color.map_or(name.to_string(), |c| format!("{c} {name}"));
    let article = if described.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    let number = match (quantity, rng.random_range(0..3)) {
        (1, 0 | 1) => article.to_string(),
        (n, 0) => n.to_string(),
        (12, 1) => "a dozen".to_string(),
        (n, _) => NUMBERS[n - 1].to_string(),
    };
    (format!("{number} {described}"), json!({ "name": singular, "quantity": quantity, "color": color }))
}

/// A place or a day, or nothing.
fn detail(rng: &mut ChaCha8Rng, phrases: &[&str], names: &[&'static str]) -> (String, Option<&'static str>) {
    if rng.random_bool(0.3) {
        return (String::new(), None);
    }
    let name = *choose(rng, names);
    (choose(rng, phrases).replace("{}", name), Some(name))
}

fn choose<'a, T>(rng: &mut ChaCha8Rng, from: &'a [T]) -> &'a T {
    from.choose(rng).unwrap_or(&from[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_depend_on_the_seed_alone_and_never_repeat() {
        let rows = demo_rows(7, [300, 20, 100]);
        assert_eq!(rows, demo_rows(7, [300, 20, 100]));
        assert_ne!(rows[0], demo_rows(8, [300, 20, 100])[0]);
        let prompts: HashSet<&str> = rows.iter().flatten().map(|r| r.prompt.as_str()).collect();
        assert_eq!(prompts.len(), 420);
    }

    #[test]
    fn every_answer_says_what_its_sentence_says() {
        for row in demo_rows(3, [500, 1, 1])[0].iter() {
            let answer: Value = serde_json::from_str(&row.completion).unwrap();
            assert_eq!(row.completion, answer.to_string(), "strict JSON, keys in order");
            for item in answer["items"].as_array().unwrap() {
                let name = item["name"].as_str().unwrap();
                assert!(row.prompt.contains(&name[..name.len() - 2]), "{row:?}");
                assert!(item["color"].is_null() || row.prompt.contains(item["color"].as_str().unwrap()));
            }
            for key in ["city", "day"] {
                assert!(
                    answer[key].is_null() || row.prompt.contains(answer[key].as_str().unwrap()),
                    "{row:?}"
                );
            }
        }
    }
}
