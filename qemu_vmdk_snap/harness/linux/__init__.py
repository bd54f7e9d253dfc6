"""The Linux guest: made of the distribution's packages, booted on images, told what to do by framed commands."""
