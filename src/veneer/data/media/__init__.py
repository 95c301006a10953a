"""Pictures and clips of sound: folders of them as rows, and the files that rows name."""
