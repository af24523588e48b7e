// Written by tests/pages/explore_data.py; change that, and run it.
(self.refinferData ??= {})["schedule"] = {
"models":[
{"name":"qwen2-0.5b","format":"bf16","bytes":987922432},
{"name":"llama-1b","format":"int8","bytes":1240576000},
{"name":"llama2-7b","format":"bf16","bytes":13214154752},
{"name":"llama2-70b","format":"int4","bytes":38651166720}
],
"shares":[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,1.0,null],
"devices":[
{"name":"emmc","source":"eMMC 5.1, JESD84-B51: HS400 carries 400 MB/s; about 300 are reached"},
{"name":"ufs-3.1","source":"UFS 3.1, sequential reads of 2,100 MB/s as its makers state"},
{"name":"ufs-4.0","source":"UFS 4.0, sequential reads of 4,200 MB/s as its makers state"},
{"name":"sata-ssd","source":"SATA 3.2: 6 Gbit/s carry 550 MB/s"},
{"name":"nvme","source":"PCIe 3.0 x4: 3,500 MB/s, as makers of such drives state"},
{"name":"virtual-disk","source":"a virtual disk such as that of the figures page, direct reads of 1 to 4 MiB, measured on 2026-11-21"}
],
"arms":[
{"name":"none","about":"nothing is locked; every chunk is read for every token"},
{"name":"leading","about":"the first chunks of the model are locked, as many as fit: the paper's unbalanced baseline"},
{"name":"balanced","about":"the same share of every stretch of the model is locked"},
{"name":"attention-first","about":"the smallest matrices are locked first, kind by kind over all layers"},
{"name":"ffn-first","about":"gate, up and down are locked first"},
{"name":"flexinfer","about":"the paper's Algorithm 1, literally: whole tensors, some kinds over all layers"},
{"name":"optimal","about":"the best lock and ring of a stated family, by the simulator"},
{"name":"synchronous","about":"the locks of optimal, but each chunk is read only when it is needed"},
{"name":"mmap","about":"no plan: a page cache of the same size, which forgets what was used longest ago"}
],
"plans":["none","leading","balanced","attention-first","ffn-first","flexinfer","optimal"],
"processor":"one core of the figures page",
"processorSource":"refinfer bench matmul, docs/figures/matmul.json, 4096 square",
"positions":512,
"columns":100
};
