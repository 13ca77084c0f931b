"""What the tests share: inputs in guard bands, nets, oracles, transcriptions of papers, ranks, builds."""
