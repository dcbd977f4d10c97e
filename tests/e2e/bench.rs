//! `flotilla bench engine`: figures that fit together, whatever the machine.

use flotilla_tests::{Workplace, repository};
use serde_json::Value;

#[test]
fn the_engine_is_measured_batch_by_batch() {
    let model = repository().join("models/flotilla-reader");
    let options = "--input-len 40 --output-len 6 --batch 1,5 --threads 2 --repeat 3";
    let place = Workplace::new();
    let command = format!("bench engine --model {} {options}", model.display());
    let output = place.run(&format!("{command} --max-num-batched-tokens 64 --json"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for limit in ["read_bytes_per_second", "operations_per_second"] {
        assert!(report["limits"][limit].as_f64().unwrap() > 1e7, "{report}");
    }
    let rows = report["rows"].as_array().unwrap();
    let batches: Vec<u64> = rows.iter().map(|row| row["batch"].as_u64().unwrap()).collect();
    assert_eq!(batches, [1, 5]);
    for (row, batch) in rows.iter().zip([1.0, 5.0]) {
        let figure = |name: &str| row[name].as_f64().unwrap();
        let seconds = figure("seconds");
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-6;
        assert!(near(figure("generated_tokens_per_second") * seconds, batch * 6.0), "{row}");
        assert!(near(figure("total_tokens_per_second") * seconds, batch * 46.0), "{row}");
        assert!(figure("prefill_tokens_per_second") > 0.0, "{row}");
        assert!(figure("decode_tokens_per_second") > 0.0, "{row}");
        let first = figure("time_to_first_token_seconds");
        assert!(0.0 < first && first < seconds, "{row}");
        assert!(figure("share_of_limit") > 0.0, "{row}");
        assert!(figure("peak_memory_bytes") > 8e6, "{row}");
        let all = row["all_generated_tokens_per_second"].as_array().unwrap();
        let mut all: Vec<f64> = all.iter().map(|rate| rate.as_f64().unwrap()).collect();
        all.sort_by(f64::total_cmp);
        assert!(near(all[1], figure("generated_tokens_per_second")), "{row}");
    }
    // Five prompts of 40 tokens take four steps of 64, and the last of them generates for as long as the first.
    assert!(rows[1]["steps"].as_u64().unwrap() > rows[0]["steps"].as_u64().unwrap());

    let output = place.run(&format!("{command} --precision q8_0"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("OF THE LIMIT") && text.lines().count() == 6, "{text}");
    let model = model.display();
    let command = format!("bench engine --model {model} --batch 1 --input-len 99999");
    let said = place.run_expecting(1, &command);
    assert!(said.contains("99999 tokens and 64 more don't fit"), "{said}");
}
