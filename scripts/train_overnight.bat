@echo off
rem Trains through the night with the guide's settings: 100 epochs, a checkpoint after each under models\, every line in logs\.
rem   scripts\train_overnight.bat --dataset_path my_questions.json
rem Arguments go on to train_sft.py; its exit status is this script's.
setlocal
set "PYTHONIOENCODING=utf-8"
if not defined PYTHON set "PYTHON=python"
if not exist logs mkdir logs
for /f %%t in ('powershell -NoProfile -Command "Get-Date -Format yyyyMMdd_HHmmss"') do set "log=logs\train_overnight_%%t.log"
echo log: %log%  (follow it: powershell Get-Content -Encoding utf8 -Wait %log%)
"%PYTHON%" "%~dp0..\train_sft.py" --recipe "%~dp0..\recipes\training\sft\theta.yaml" %* > "%log%" 2>&1
set "status=%errorlevel%"
powershell -NoProfile -Command "Get-Content -Encoding utf8 -Tail 20 '%log%'"
exit /b %status%
