"""Metrics, computed as the field computes them.

Features            features: make_extractor, Extractor, PROTOCOLS
Statistics          statistics: Moments, Scores, summarise, read_statistics, write_statistics
Distances           frechet: frechet_distance, kernel_distance; manifold: precision_recall
Reconstruction      reconstruction: psnr, ssim, ms_ssim
While training      schedule: small_fid, data_reference
Representations     probe: layer_features, fit_probe, accuracy_by_layer
Inception           inception: Inception; weights: find_weights, load_inception; resize
"""
